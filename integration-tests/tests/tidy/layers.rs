//! The client's layers: a file may use only what stands before it, and no two files use each other.

use std::collections::{BTreeMap, BTreeSet};

use syn::visit::Visit;

use super::{assert_none, sources};

/// A file of a layer may use files of its own layer and of those before it. ARCHITECTURE.md says what each is for.
const LAYERS: [&str; 18] = [
    "error",
    "node_state",
    "plan",
    "source_checks",
    "cli",
    "config",
    "monitor",
    "outcome",
    "task",
    "staging",
    "target",
    "source",
    "divergence",
    "apply",
    "strategy",
    "prepare",
    "commands",
    "panics",
];

/// Crates of which no two files use each other.
const CRATES: [&str; 7] =
    ["pg-format", "data-dir", "proto", "server", "client", "certs", "integration-tests"];

/// Paths that begin with `crate`, `self` or `super`, with the module they stand in.
#[derive(Default)]
struct Paths {
    module: Vec<String>,
    found: BTreeSet<Vec<String>>,
}

impl Paths {
    fn note(&mut self, path: &[String]) {
        let mut absolute = self.module.clone();
        let mut rest = path;
        match rest.first().map(String::as_str) {
            Some("crate") => {
                absolute.clear();
                rest = rest.get(1..).unwrap_or_default();
            }
            Some("self") => rest = rest.get(1..).unwrap_or_default(),
            Some("super") => {
                while rest.first().is_some_and(|part| part == "super") {
                    absolute.pop();
                    rest = rest.get(1..).unwrap_or_default();
                }
            }
            _ => {}
        }
        absolute.extend(rest.iter().cloned());
        self.found.insert(absolute);
    }

    fn tree(&mut self, tree: &syn::UseTree, before: &[String]) {
        let with = |name: &syn::Ident| {
            let mut path = before.to_vec();
            path.push(name.to_string());
            path
        };
        match tree {
            syn::UseTree::Path(path) => self.tree(&path.tree, &with(&path.ident)),
            syn::UseTree::Group(group) => {
                group.items.iter().for_each(|tree| self.tree(tree, before));
            }
            syn::UseTree::Name(name) if name.ident == "self" => self.note(before),
            syn::UseTree::Name(name) => self.note(&with(&name.ident)),
            syn::UseTree::Rename(rename) => self.note(&with(&rename.ident)),
            syn::UseTree::Glob(_) => self.note(before),
        }
    }
}

impl<'ast> Visit<'ast> for Paths {
    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        self.tree(&item.tree, &[]);
    }

    /// Who may see something is not who is used.
    fn visit_visibility(&mut self, _: &'ast syn::Visibility) {}

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let parts: Vec<String> = path.segments.iter().map(|part| part.ident.to_string()).collect();
        self.note(&parts);
        syn::visit::visit_path(self, path);
    }
}

/// A crate's files by their module, and which modules each uses.
fn uses(name: &str) -> BTreeMap<String, BTreeSet<String>> {
    let source = format!("{name}/src/");
    let files: Vec<(Vec<String>, String)> = sources(&[name])
        .into_iter()
        .filter_map(|(path, text)| {
            let module = path.strip_prefix(&source)?.strip_suffix(".rs")?;
            let is_module = !matches!(module, "lib" | "main");
            is_module.then(|| (module.split('/').map(str::to_owned).collect(), text))
        })
        .collect();
    let modules: BTreeSet<Vec<String>> = files.iter().map(|(module, _)| module.clone()).collect();
    let mut uses = BTreeMap::new();
    for (module, text) in files {
        let file = syn::parse_file(&text).expect("a file that compiles");
        let mut paths = Paths { module: module.clone(), found: BTreeSet::new() };
        paths.visit_file(&file);
        let used = paths.found.into_iter().filter_map(|path| {
            let known = (1..=path.len()).rev().filter_map(|length| path.get(..length));
            known.map(<[String]>::to_vec).find(|prefix| modules.contains(prefix))
        });
        let used = used.filter(|used| *used != module).map(|used| used.join("::")).collect();
        uses.insert(module.join("::"), used);
    }
    uses
}

fn layer(module: &str) -> Option<usize> {
    let top = module.split("::").next().unwrap_or_default();
    LAYERS.iter().position(|layer| *layer == top)
}

#[test]
fn a_file_of_the_client_uses_only_layers_before_its_own() {
    let mut faults = Vec::new();
    for (module, used) in uses("client") {
        let Some(own) = layer(&module) else {
            faults.push(format!("{module} is in no layer"));
            continue;
        };
        let later = used.into_iter().filter(|used| layer(used).is_none_or(|other| other > own));
        faults.extend(later.map(|used| format!("{module} uses {used}")));
    }
    assert_none(&faults, "the client's layers");
}

#[test]
fn the_map_shows_the_layers() {
    let page = std::fs::read_to_string(super::root().join("ARCHITECTURE.md")).unwrap();
    let table = page.lines().skip_while(|line| !line.starts_with("| layer |")).skip(2);
    let rows = table.take_while(|line| line.starts_with('|'));
    let names = rows.flat_map(|row| {
        let first = row.split('|').nth(1).unwrap_or_default();
        let names = first.split(',').map(|name| name.trim().trim_matches(['`', '/']).to_owned());
        names.collect::<Vec<_>>()
    });
    assert_eq!(names.collect::<Vec<_>>(), LAYERS);
}

/// Whether `to` is reached from `from`.
fn reaches(uses: &BTreeMap<String, BTreeSet<String>>, from: &str, to: &str) -> bool {
    let mut seen = BTreeSet::new();
    let mut open = vec![from];
    while let Some(module) = open.pop() {
        for used in uses.get(module).into_iter().flatten() {
            if used == to {
                return true;
            }
            if seen.insert(used.as_str()) {
                open.push(used);
            }
        }
    }
    false
}

#[test]
fn no_two_files_use_each_other() {
    let mut faults = Vec::new();
    for name in CRATES {
        let uses = uses(name);
        let circular = uses.keys().filter(|module| reaches(&uses, module, module));
        faults.extend(circular.map(|module| format!("{name}: {module} is reached from itself")));
    }
    assert_none(&faults, "no cycles between files");
}

/// The pure layers decide on values alone.
#[test]
fn plans_are_made_of_values() {
    let allowed = ["error", "plan"];
    let mut faults = Vec::new();
    for (module, used) in uses("client") {
        if !module.starts_with("plan") {
            continue;
        }
        let other = used
            .into_iter()
            .filter(|used| !allowed.contains(&used.split("::").next().unwrap_or_default()));
        faults.extend(other.map(|used| format!("{module} uses {used}")));
    }
    assert_none(&faults, "client/src/plan uses nothing of the client but errors");
}
