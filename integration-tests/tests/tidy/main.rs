//! The countable rules of the house, and the invariants of ARCHITECTURE.md.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on ends there")]

mod bodies;
mod layers;
mod messages;
mod shapes;

use std::fs;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn rust_files(directory: &Path) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut visit = vec![directory.to_owned()];
    while let Some(path) = visit.pop() {
        if path.is_dir() {
            // What cargo builds, but not the module of that name.
            if !path.join("CACHEDIR.TAG").exists() {
                visit.extend(fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()));
            }
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let name = path.strip_prefix(root()).unwrap().to_string_lossy().into_owned();
            found.push((name, fs::read_to_string(path).unwrap()));
        }
    }
    found
}

/// Files that only tests are made of.
const TEST_FILES: [&str; 3] = ["/tests.rs", "/test_values.rs", "/test_peer.rs"];

/// Sources of the products, tests left out.
fn product() -> Vec<(String, String)> {
    sources(&["pg-format", "data-dir", "proto", "server", "client", "certs"])
}

/// Sources of some crates, tests left out.
fn sources(crates: &[&str]) -> Vec<(String, String)> {
    let files = crates.iter().flat_map(|name| rust_files(&root().join(name).join("src")));
    files
        .filter(|(name, _)| TEST_FILES.iter().all(|test| !name.ends_with(test)))
        .map(|(name, text)| {
            let code = text.split("#[cfg(test)]").next().unwrap_or_default().to_owned();
            (name, code)
        })
        .collect()
}

fn assert_none(faults: &[String], rule: &str) {
    assert!(faults.is_empty(), "{rule}: {faults:#?}");
}

/// Files whose code has one of `words`, but for `allowed` paths. Comments do not count.
fn with_words(within: &[&str], words: &[&str], allowed: &[&str]) -> Vec<String> {
    let mut faults = Vec::new();
    for (name, text) in product() {
        let inside = within.iter().any(|prefix| name.starts_with(prefix));
        if !inside || allowed.iter().any(|prefix| name.starts_with(prefix)) {
            continue;
        }
        for (number, line) in text.lines().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            if words.iter().any(|word| code.contains(word)) {
                faults.push(format!("{name}:{}: {}", number + 1, line.trim()));
            }
        }
    }
    faults
}

#[test]
fn files_open_with_their_purpose_and_stay_small() {
    let mut faults = Vec::new();
    for (name, text) in rust_files(&root()) {
        if !text.starts_with("//!") {
            faults.push(format!("{name} does not open with //!"));
        }
        if text.lines().count() > 600 {
            faults.push(format!("{name} has {} lines", text.lines().count()));
        }
    }
    assert_none(&faults, "files are small and say what they are for");
}

#[test]
fn nothing_is_left_for_later() {
    let words = ["TODO", "FIXME", "todo!(", "unimplemented!(", "dbg!("];
    let marks: Vec<String> = product()
        .iter()
        .filter(|(_, text)| words.iter().any(|word| text.contains(word)))
        .map(|(name, _)| name.clone())
        .collect();
    assert_none(&marks, "no TODO on main");
    assert_none(&with_words(&[""], &[".unwrap()"], &[]), "unwrap only in tests");
}

#[test]
fn no_file_is_for_everything() {
    let banned = ["utils", "common", "types", "helpers"];
    let faults: Vec<String> = product()
        .into_iter()
        .map(|(name, _)| name)
        .filter(|name| name.split(['/', '.']).any(|part| banned.contains(&part)))
        .collect();
    assert_none(&faults, "no utils, common, types or helpers");
}

#[test]
fn formats_and_plan_do_no_io() {
    let words = ["std::fs::File", "File::open", "async fn", "tokio", "tonic", "rustix", "std::net"];
    let faults = with_words(&["pg-format/src", "client/src/plan"], &words, &[]);
    assert_none(&faults, "pg-format and client/src/plan* do no I/O and are not async");
}

#[test]
fn generated_messages_stay_in_proto() {
    let faults = with_words(&["server/src", "client/src"], &["proto::wire", "pgrejoin_v1"], &[]);
    assert_none(&faults, "generated messages are named in proto only");
}

#[test]
fn only_the_disk_writes() {
    let words = [
        "File::create",
        "OpenOptions",
        "File::options",
        "fs::remove",
        "fs::rename",
        "renameat",
        "unlinkat",
        "mkdirat",
        "symlinkat",
        "fs::create_dir",
        "OFlags::CREATE",
        "OFlags::RDWR",
        "write_all_at",
        "set_len(",
    ];
    // `wal_archive.rs` writes to nameless and private temporary files outside the target, `preflight.rs` opens for
    // writing without writing, `confined.rs` opens for others with the flags they give.
    let allowed = [
        "client/src/staging/",
        "client/src/apply/preflight.rs",
        "client/src/target/wal_archive.rs",
        "data-dir/src/confined.rs",
    ];
    let faults: Vec<String> =
        with_words(&["client/src", "server/src", "data-dir/src"], &words, &allowed)
            .into_iter()
            // Nameless files, filled from the source.
            .filter(|fault| {
                !(fault.starts_with("client/src/divergence/search.rs") && fault.contains("file."))
            })
            .collect();
    assert_none(&faults, "every change of the target goes through client/src/staging/disk.rs");
}

#[test]
fn queues_have_bounds() {
    let words = ["unbounded_channel", "unbounded()", "mpsc::channel()"];
    assert_none(&with_words(&[""], &words, &[]), "every queue has a bound");
}

#[test]
fn only_main_and_the_monitors_print() {
    let words = ["println!", "eprintln!", "print!(", "eprint!("];
    let allowed =
        ["client/src/main.rs", "server/src/main.rs", "certs/src/main.rs", "client/src/monitor/"];
    assert_none(
        &with_words(
            &["client", "server", "proto", "pg-format", "data-dir", "certs/src"],
            &words,
            &allowed,
        ),
        "only main.rs and the monitors print",
    );
}

#[test]
fn every_promise_names_a_test_that_exists() {
    let semantics = fs::read_to_string(root().join("docs/SEMANTICS.md")).unwrap();
    let tests: String =
        rust_files(&root()).into_iter().map(|(_, text)| text).collect::<Vec<_>>().join("\n");
    let mut promises = 0;
    for line in semantics.lines().filter(|line| line.starts_with("- ")) {
        promises += 1;
        let named = line.rsplit_once('`').and_then(|(head, _)| head.rsplit_once('`'));
        let (_, name) = named.unwrap_or_else(|| panic!("no test is named: {line}"));
        assert!(tests.contains(&format!("fn {name}(")), "no test {name}: {line}");
    }
    assert!(promises >= 20, "only {promises} promises");
}

/// A mutant that names a test that is not there is not noticed, whatever it does.
#[test]
fn every_mutant_names_tests_that_exist() {
    let crates =
        ["pg-format", "data-dir", "proto", "server", "client", "certs", "integration-tests"];
    let files = crates.iter().flat_map(|name| rust_files(&root().join(name)));
    let code: Vec<String> = files.map(|(_, text)| text).collect();
    let mut faults = Vec::new();
    for patch in fs::read_dir(root().join("integration-tests/mutants")).unwrap().flatten() {
        let text = fs::read_to_string(patch.path()).unwrap();
        let tests = text.lines().find_map(|line| line.strip_prefix("# tests: ")).unwrap();
        let names = tests.split("test(").skip(1).filter_map(|rest| rest.split(')').next());
        for name in names {
            let regex = name.starts_with('/');
            let parts = name.trim_matches('/').split("::").filter(|part| !part.is_empty());
            let last = parts.last().unwrap_or_default();
            let found = match regex {
                true => code.iter().any(|text| text.contains(last)),
                false => ["fn", "mod"].iter().any(|kind| {
                    let [call, end] = [format!("{kind} {last}("), format!("{kind} {last};")];
                    code.iter().any(|text| text.contains(&call) || text.contains(&end))
                }),
            };
            if !found {
                faults.push(format!("{:?}: {name}", patch.file_name()));
            }
        }
    }
    assert_none(&faults, "tests of mutants");
}

/// One table makes the README, `--help` and the codes themselves.
#[test]
fn the_readme_has_every_exit_code() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let rows = client::error::EXIT_CODES
        .iter()
        .map(|exit| format!("| {} | {} | {} |", exit.shown(), exit.meaning, exit.target));
    let missing: Vec<String> = rows.filter(|row| !readme.contains(row)).collect();
    assert_none(&missing, "the README's table of exit codes");
}

/// A crate names what it depends on; what generated code alone uses is listed here.
#[test]
fn every_dependency_is_used() {
    const GENERATED: [(&str, &str); 1] = [("proto", "tonic-prost")];
    const RENAMED: [(&str, &str); 4] = [
        ("pgrejoin-proto", "proto"),
        ("pgrejoin-server", "server"),
        ("pgrejoin", "client"),
        ("pgrejoin-certs", "certs"),
    ];
    let mut faults = Vec::new();
    for name in ["pg-format", "data-dir", "proto", "server", "client", "certs", "integration-tests"]
    {
        let manifest = fs::read_to_string(root().join(name).join("Cargo.toml")).unwrap();
        let files = rust_files(&root().join(name));
        let code: String = files.into_iter().map(|(_, text)| text).collect();
        let words: std::collections::BTreeSet<&str> =
            code.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').collect();
        let mut inside = false;
        for line in manifest.lines() {
            if line.starts_with('[') {
                inside = line.ends_with("dependencies]");
                continue;
            }
            let dependency = line.split(['.', ' ', '=']).next().unwrap_or_default();
            if !inside || dependency.is_empty() || dependency.starts_with('#') {
                continue;
            }
            let renamed = RENAMED.iter().find(|(package, _)| *package == dependency);
            let ident = renamed.map_or(dependency.replace('-', "_"), |(_, lib)| (*lib).to_owned());
            if !words.contains(ident.as_str()) && !GENERATED.contains(&(name, dependency)) {
                faults.push(format!("{name}: {dependency}"));
            }
        }
    }
    assert_none(&faults, "every dependency is used");
}

/// Numbers of rules in a text: an `R` and a number that stand alone.
fn rules_in(text: &str) -> Vec<String> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    let rules = words.filter(|word| {
        let number = word.strip_prefix('R').unwrap_or_default();
        (1..=2).contains(&number.len()) && number.bytes().all(|byte| byte.is_ascii_digit())
    });
    rules.map(str::to_owned).collect()
}

#[test]
fn every_rule_that_is_cited_is_in_the_repository() {
    let rules = fs::read_to_string(root().join("docs/RULES.md")).unwrap();
    let headings: Vec<String> =
        rules.lines().filter(|line| line.starts_with("## R")).flat_map(rules_in).collect();
    let mut faults = Vec::new();
    for (name, text) in rust_files(&root()) {
        let comments = text.lines().enumerate().filter(|(_, line)| line.contains("//"));
        for (number, line) in comments {
            let cited = rules_in(line).into_iter().filter(|rule| !headings.contains(rule));
            faults.extend(cited.map(|rule| format!("{name}:{}: {rule}", number + 1)));
            let papers = ["facts ", "design ", "performance A", "performance B", "reliability "];
            let elsewhere = papers.iter().filter(|paper| {
                line.split_once(**paper).is_some_and(|(_, rest)| {
                    rest.starts_with(|c: char| c.is_ascii_digit() || c == '.')
                })
            });
            faults.extend(elsewhere.map(|paper| format!("{name}:{}: {paper}", number + 1)));
        }
    }
    assert_none(&faults, "a rule is cited only if docs/RULES.md has it");
}

#[test]
fn every_rule_names_tests_that_exist() {
    let rules = fs::read_to_string(root().join("docs/RULES.md")).unwrap();
    let code: String =
        rust_files(&root()).into_iter().map(|(_, text)| text).collect::<Vec<_>>().join("\n");
    let quoted = rules.split('`').skip(1).step_by(2);
    let is_test = |name: &&str| name.matches('_').count() >= 4 && name.to_lowercase() == **name;
    let tests = quoted.filter(is_test);
    let missing: Vec<String> =
        tests.filter(|name| !code.contains(&format!("fn {name}("))).map(str::to_owned).collect();
    assert_none(&missing, "docs/RULES.md names tests that exist");
}

/// A patch that switches a rule off must keep up with the code it changes.
#[test]
fn every_mutant_applies() {
    let directory = root().join("integration-tests/mutants");
    let patches: Vec<_> = fs::read_dir(&directory).unwrap().flatten().collect();
    assert!(patches.len() >= 10, "only {} mutants", patches.len());
    for patch in patches {
        let mut check = std::process::Command::new("git");
        let checked = check.args(["apply", "--check"]).arg(patch.path()).current_dir(root());
        let output = checked.output().expect("git runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}
