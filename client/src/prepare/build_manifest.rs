//! What is sealed: everything that will be changed, in one manifest, and what is told about it.

use std::collections::BTreeSet;

use pg_format::backup_label::backup_label;
use pg_format::control_file::control_file_for_recovery;
use pg_format::wal::SegmentName;
use pg_format::{DataPath, Lsn};
use proto::model::{Description, Sealed};

use crate::apply::pg_wal;
use crate::error::{Class, RewindError};
use crate::outcome::{Outcome, Result as Ended, SourceWal, utc_now};
use crate::plan::pg_wal::{WalChanges, WalFacts, changes};
use crate::plan::short_segments::{Read, final_lengths};
use crate::plan::summary::Totals;
use crate::prepare::fetch::Staged;
use crate::prepare::seal::Sealing;
use crate::prepare::wal_follower::WalFollower;
use crate::staging::disk::FileStat;
use crate::staging::manifest::{Manifest, PackDigest};
use crate::staging::{layout, staging};
use crate::target::recovery_conf;
use crate::target::unstarted::label;

impl Sealing<'_> {
    fn wal_changes(
        &self,
        sealed: &Sealed,
        staged: &BTreeSet<SegmentName>,
    ) -> Result<WalChanges, RewindError> {
        let below = |directory: &str| -> Vec<String> {
            let files = self.target.files.keys();
            let inside = files
                .filter(|path| path.parent().is_some_and(|parent| parent.as_str() == directory));
            inside.map(|path| path.file_name().to_owned()).collect()
        };
        let facts = WalFacts {
            names: &below("pg_wal"),
            statuses: &below("pg_wal/archive_status"),
            summaries: &below("pg_wal/summaries"),
            size: self.source.node.control.wal_segment_size,
            history: self.history,
            histories: &sealed.node.histories,
            fork: self.analysis.fork.map(|fork| fork.lsn),
            target_end: self.analysis.target_end,
            start: self.choice.start.redo,
            staged,
            end: sealed.end,
            keep_as: self.config.keep_diverged.then(|| self.diverged_name()),
        };
        changes(&facts).map_err(|error| {
            RewindError::because(Class::Other, "the target's pg_wal cannot be planned", error)
        })
    }

    /// `<timeline>-<fork>`, with a number if an earlier rewind has used that name.
    fn diverged_name(&self) -> String {
        let timeline = self.target.history.tip();
        let fork = self.analysis.fork.map_or(Lsn::INVALID, |fork| fork.lsn);
        let plain = format!("{timeline}-{:X}", fork.as_u64());
        let taken = |name: &str| {
            let path = layout::diverged(&self.target.directory, name, "x");
            path.parent().is_some_and(|path| matches!(self.disk.is_directory(&path), Ok(Some(_))))
        };
        let mut name = plain.clone();
        let mut number = 2;
        while taken(&name) {
            name = format!("{plain}-{number}");
            number += 1;
        }
        name
    }

    fn segment_digests(&self, staged: &BTreeSet<SegmentName>) -> std::io::Result<Vec<PackDigest>> {
        let size = self.source.node.control.wal_segment_size;
        let names = staged.iter().map(|name| name.file_name(size));
        names.map(|name| pg_wal::digest(&**self.disk, &name)).collect()
    }

    pub(crate) fn manifest(
        &self,
        sealed: &Sealed,
        staged: &Staged,
        wal: &BTreeSet<SegmentName>,
        auto_conf: Option<Vec<u8>>,
    ) -> Result<Manifest, RewindError> {
        let fault = |error| RewindError::because(Class::Other, "pg_control cannot be made", error);
        let size = self.source.node.control.wal_segment_size;
        let control = &sealed.node.control_bytes;
        let new_control =
            control_file_for_recovery(control, sealed.end, sealed.end_timeline).map_err(fault)?;
        let remove = ["recovery.signal", "tablespace_map"].map(DataPath::new);
        let remove: Result<Vec<_>, _> = remove.into_iter().collect();
        let read = Read { shorter: &staged.notes.shorter, vanished: &staged.notes.vanished };
        let target = &self.target.files;
        let (files, shorter) = final_lengths(&self.plan.files, self.files, target, read);
        let before = files.iter().map(|file| FileStat::of(target.get(&file.path)?));
        Ok(Manifest {
            program_version: env!("CARGO_PKG_VERSION").to_owned(),
            old_control: self.target.control.bytes.clone(),
            backup_label: backup_label(self.choice.start, size, &utc_now(), &label(&new_control))
                .into_bytes(),
            new_control,
            before: before.collect(),
            files,
            packs: staged.packs.clone(),
            staging: self.staging.cloned(),
            segments: self.segment_digests(wal).map_err(staging)?,
            shorter: shorter.into_iter().collect(),
            vanished: staged.notes.vanished.iter().copied().collect(),
            wal: self.wal_changes(sealed, wal)?,
            settings: recovery_conf::files(self.config, self.target, auto_conf)?,
            remove: remove.map_err(fault)?,
            undo: None,
            sync: self.config.sync,
            summary: format!("the target is rewound and follows timeline {}", sealed.node.timeline),
        })
    }

    pub(crate) fn outcome(
        &self,
        sealed: &Sealed,
        staged: &Staged,
        (follower, manifest, described): (&WalFollower, &Manifest, Option<&Description>),
    ) -> Outcome {
        let reason = format!("the target is rewound and follows timeline {}", sealed.node.timeline);
        let mut outcome = Outcome::new(Ended::Rewound, reason);
        outcome.fork = self.analysis.fork.map(|fork| (fork.lsn, fork.timeline));
        outcome.strategy = Some((self.choice.strategy.name(), self.choice.why.clone()));
        outcome.totals = Totals::of(&self.plan);
        outcome.carriage.hashes = self.hash_bytes;
        let wal = staged.wal_payload_bytes;
        outcome.carriage.data = staged.carried.total().saturating_sub(wal);
        outcome.carriage.wal_payload = wal + self.ahead.answer.payload_bytes;
        outcome.carriage.signatures = staged.signature_bytes;
        outcome.carriage.frames = staged.carried.frames;
        outcome.carriage.pages = staged.notes.pages - staged.recovered_pages;
        outcome.carriage.recovered = staged.recovered_pages;
        outcome.carriage.covered = staged.covered_pages;
        outcome.carriage.reconnects = staged.carried.reconnects;
        let used = staged.carried.payload_bytes.iter().filter(|bytes| **bytes > 0);
        outcome.carriage.connections = used.count();
        outcome.carriage.round_trips = self.session.waits();
        outcome.carriage.congestion_control.clone_from(&self.source.congestion_control);
        outcome.carriage.undo = manifest
            .undo
            .iter()
            .flat_map(|undo| undo.images.iter().map(|digest| digest.bytes))
            .sum();
        outcome.carriage.wal = follower.fetched_bytes();
        outcome.replay = Some((self.choice.start.redo, sealed.end));
        outcome.kept = self.kept.clone();
        let now = time::OffsetDateTime::now_utc().unix_timestamp();
        outcome.source_wal = described.and_then(|source| SourceWal::of(source, sealed.end, now));
        if let (Some(name), false) = (&manifest.wal.keep_as, manifest.wal.diverged.is_empty()) {
            let place = layout::diverged(&self.target.directory, name, "x").parent();
            outcome.kept.push(format!(
                "WAL of lost transactions ({} files) is kept in {} until you remove it",
                manifest.wal.diverged.len(),
                place.map_or_else(String::new, |place| place.to_string())
            ));
        }
        let waiting = &manifest.wal.waiting;
        if !waiting.is_empty() {
            outcome.kept.push(format!(
                "{} WAL segments older than the start of replay stay, from the oldest one that waits to be archived \
                 on (marks .ready in pg_wal/archive_status)",
                waiting.len()
            ));
        }
        outcome
    }
}
