//! Where the source's tablespaces go that the target does not have, and which strategies that leaves.

use std::collections::BTreeMap;

use pg_format::DataPath;
use proto::model::Description;

use crate::config::TablespaceMapping;
use crate::error::{Class, NotPossible, RewindError};
use crate::plan::{Strategy, TargetFiles};
use crate::target::places::check_place;

/// A tablespace of the source that is linked there and that the target does not have.
struct NewTablespace<'a> {
    oid: u32,
    /// Its place on the source.
    location: &'a str,
    /// The place that the operator has named for it.
    mapped_to: Option<&'a str>,
}

fn new_tablespaces<'a>(
    target: &'a TargetFiles,
    source: &'a Description,
    mapping: &'a [TablespaceMapping],
) -> impl Iterator<Item = NewTablespace<'a>> {
    source.tablespaces.iter().filter_map(move |tablespace| {
        let location = tablespace.location.as_deref()?;
        let path = DataPath::new(format!("pg_tblspc/{}", tablespace.oid)).ok()?;
        let mapped = mapping.iter().find(|mapping| mapping.from == location);
        let mapped_to = mapped.map(|mapping| mapping.to.as_str());
        let is_new = !target.contains_key(&path);
        is_new.then_some(NewTablespace { oid: tablespace.oid, location, mapped_to })
    })
}

/// Why replay from the fork could not make the source's new tablespaces: it would use their literal paths.
pub fn against_fork(
    target: &TargetFiles,
    source: &Description,
    mapping: &[TablespaceMapping],
) -> Option<NotPossible> {
    new_tablespaces(target, source, mapping).find_map(|new| {
        let mapped = || new.mapped_to.map(|_| "is mapped to another one".to_owned());
        let taken = check_place(new.location).err().map(|why| why.to_string());
        let why = taken.or_else(mapped)?;
        let NewTablespace { oid, location, .. } = new;
        Some(NotPossible::as_asked(format!(
            "the source created tablespace {oid} in directory {location}, which {why} on the target"
        )))
    })
}

/// Where each linked tablespace is created that the target does not have, by OID.
///
/// # Errors
/// A directory is not empty, or does not belong to our user.
pub fn places(
    target: &TargetFiles,
    source: &Description,
    mapping: &[TablespaceMapping],
    strategy: Strategy,
) -> Result<BTreeMap<u32, String>, RewindError> {
    let refuse = |message: String| RewindError::new(Class::Preflight, message);
    let mut places = BTreeMap::new();
    for NewTablespace { oid, location, mapped_to } in new_tablespaces(target, source, mapping) {
        if mapped_to.is_some() && strategy == Strategy::Fork {
            return Err(refuse(format!(
                "tablespace {oid} was created after the fork point and replay will use its \
                 original path {location}: --tablespace-mapping works with --strategy latest or \
                 compare"
            )));
        }
        let place = mapped_to.unwrap_or(location);
        check_place(place).map_err(|why| {
            refuse(format!(
                "tablespace {oid} of the source is in {location}, but on the target {place} {why}: \
                 make it an empty directory of this user, or give --tablespace-mapping \
                 {location}=DIR"
            ))
        })?;
        places.insert(oid, place.to_owned());
    }
    Ok(places)
}

/// Whether a tablespace of the source is mapped to another directory on the target: replay would use the
/// source's path.
pub fn is_mapped(mapping: &[TablespaceMapping], place: &str) -> bool {
    mapping.iter().any(|mapping| mapping.from == place)
}

#[cfg(test)]
mod tests {
    use pg_format::Lsn;
    use proto::model::Tablespace;

    use super::*;
    use crate::test_values::described;

    /// A source with one linked tablespace.
    fn source(location: &str) -> Description {
        let mut source = described(0..1, Lsn::new(100), 0);
        let location = Some(location.to_owned());
        source.tablespaces.push(Tablespace { oid: 16400, location });
        source.tablespaces.push(Tablespace { oid: 16401, location: None });
        source
    }

    fn mapping(from: &str, to: &str) -> Vec<TablespaceMapping> {
        vec![TablespaceMapping { from: from.to_owned(), to: to.to_owned() }]
    }

    struct Places {
        free: String,
        taken: String,
        _home: tempfile::TempDir,
    }

    fn two_places() -> Places {
        let home = tempfile::tempdir().unwrap();
        let place = |name: &str| {
            let path = home.path().join(name);
            std::fs::create_dir(&path).unwrap();
            path.display().to_string()
        };
        let (free, taken) = (place("free"), place("taken"));
        std::fs::File::create(home.path().join("taken/file")).unwrap();
        Places { free, taken, _home: home }
    }

    #[test]
    fn replay_can_make_a_tablespace_whose_own_place_is_free_here() {
        let Places { free, taken, _home } = &two_places();
        let none = TargetFiles::new();
        assert_eq!(against_fork(&none, &source(free), &[]), None);
        let why = against_fork(&none, &source(taken), &[]).unwrap().to_string();
        assert!(why.contains("16400") && why.contains("is not empty"), "{why}");
        let why = against_fork(&none, &source(free), &mapping(free, "/elsewhere")).unwrap();
        assert!(why.to_string().contains("is mapped"), "{why}");
    }

    #[test]
    fn each_new_tablespace_has_its_own_place_or_the_one_that_was_named() {
        let Places { free, taken, _home } = &two_places();
        let none = TargetFiles::new();
        let own = places(&none, &source(free), &[], Strategy::Latest).unwrap();
        assert_eq!(own, BTreeMap::from([(16400, free.clone())]));
        let mapped = mapping(taken, free);
        let mapped = places(&none, &source(taken), &mapped, Strategy::Latest).unwrap();
        assert_eq!(mapped, BTreeMap::from([(16400, free.clone())]));
        let refused = places(&none, &source(taken), &[], Strategy::Compare).unwrap_err();
        assert_eq!(refused.class(), Class::Preflight);
        assert!(refused.to_string().contains("--tablespace-mapping"), "{refused}");
    }

    #[test]
    fn replay_from_the_fork_uses_the_paths_of_the_source() {
        let Places { free, taken, _home } = &two_places();
        let mapped = mapping(taken, free);
        let refused = places(&TargetFiles::new(), &source(taken), &mapped, Strategy::Fork);
        assert!(refused.unwrap_err().to_string().contains("--strategy latest or compare"));
    }

    #[test]
    fn a_place_is_mapped_by_its_name_on_the_source() {
        let mapped = mapping("/a", "/b");
        assert!(is_mapped(&mapped, "/a"));
        assert!(!is_mapped(&mapped, "/b"));
        assert!(!is_mapped(&[], "/a"));
    }
}
