//! Reading everything that snapshots need, and checking that it is what was stored.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use mongo_core::{
    CancellationToken, Error, ErrorKind, Result,
    progress::{NoProgress, PhaseMeter, ProgressSink, Total},
    transfer::check_structure,
};
use serde::Serialize;

use crate::{
    audit::AuditAction,
    repository::{
        Repository, SnapshotChoice,
        block::Decompressor,
        documents_of,
        index::Location,
        manifest::{Consistency, SnapshotId, SnapshotManifest},
        pack::{self, PackId},
        segment::{Content, SegmentId},
        tree::TreeRoot,
    },
    setters::conduct_setters,
    timeline::Timeline,
};

/// What stands for the oplog among the namespaces of a snapshot.
const OPLOG: &str = "(oplog)";

/// Checks snapshots.
///
/// Every pack that the snapshots need is read whole: its name against the SHA-256 of its bytes, its directory, every segment
/// against its keyed hash, every document for well-formed BSON down to its last field, and counts and sizes against
/// the trees and the manifest. Nothing is written.
///
/// ```no_run
/// # async fn f(repository: mongo_backup::Repository) -> mongo_backup::Result<()> {
/// let report = mongo_backup::Verify::new(&repository).run().await?;
/// assert!(report.is_sound(), "{:?}", report.problems);
/// # Ok(()) }
/// ```
#[derive(Debug)]
#[must_use]
pub struct Verify {
    repository: Repository,
    snapshot: Option<SnapshotChoice>,
    depth: Depth,
    progress: Arc<dyn ProgressSink>,
    cancel: CancellationToken,
}

/// How much of what is stored is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Depth {
    /// Structure and checksums.
    Quick,
    /// Every segment and every document.
    Full,
}

/// What a verification found.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct VerifyReport {
    /// The snapshots that were checked.
    pub snapshots: Vec<SnapshotId>,
    /// Packs read.
    pub packs: u64,
    /// Segments and tree nodes checked; one that several snapshots share counts once.
    pub segments: u64,
    /// Documents decoded.
    pub documents: u64,
    /// Bytes of plain BSON.
    pub bytes: u64,
    /// Slices of oplogs that were read, each entry counted and the first and the last compared with their sums.
    pub slices: u64,
    /// Everything that is wrong.
    pub problems: Vec<Problem>,
}

impl VerifyReport {
    /// Whether nothing is wrong.
    pub fn is_sound(&self) -> bool {
        self.problems.is_empty()
    }
}

/// One thing that is wrong.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Problem {
    /// The object of the archive, where it is about one.
    pub object: Option<String>,
    /// What is wrong with it.
    pub what: String,
    /// The snapshots and their namespaces that cannot be restored in full because of it.
    pub affects: BTreeMap<String, BTreeSet<String>>,
}

impl Verify {
    /// Checks every snapshot of a repository.
    pub fn new(repository: &Repository) -> Self {
        Self {
            repository: repository.clone(),
            snapshot: None,
            depth: Depth::Full,
            progress: Arc::new(NoProgress),
            cancel: CancellationToken::new(),
        }
    }

    /// Checks structure and the checksums of all that is stored, and decodes no document: half the work.
    pub fn quick(mut self) -> Self {
        self.depth = Depth::Quick;
        self
    }

    /// Checks this snapshot only.
    pub fn snapshot(mut self, snapshot: impl Into<SnapshotChoice>) -> Self {
        self.snapshot = Some(snapshot.into());
        self
    }

    conduct_setters!("Stops when `token` is cancelled.");

    /// Runs the check. Damage is a finding in the report, not an error.
    ///
    /// # Errors
    /// `NotFound` for an unknown snapshot, `Cancelled`, or the archive's own when it cannot be read.
    ///
    /// # Cancel safety
    /// Dropping the future ends the check.
    #[tracing::instrument(skip_all, name = "verify")]
    pub async fn run(self) -> Result<VerifyReport> {
        let repository = self.repository.clone();
        let subject = [("snapshot", format!("{:?}", self.snapshot)), ("depth", format!("{:?}", self.depth))];
        let found = |report: &VerifyReport| Some(("problems", report.problems.len().to_string()));
        repository.recorded(AuditAction::Verify, subject, repository.while_reading(self.run_unrecorded()), found).await
    }

    async fn run_unrecorded(self) -> Result<VerifyReport> {
        let mut report = VerifyReport {
            snapshots: Vec::new(),
            packs: 0,
            segments: 0,
            documents: 0,
            bytes: 0,
            slices: 0,
            problems: Vec::new(),
        };
        let manifests = match &self.snapshot {
            Some(choice) => match self.repository.snapshot(choice).await {
                Ok(manifest) => vec![manifest],
                Err(error) if error.kind() == ErrorKind::CorruptData => {
                    report.problems.push(problem(&error, None));
                    Vec::new()
                }
                Err(error) => return Err(error),
            },
            None => {
                let list = self.repository.snapshots().await?;
                for (name, error) in list.damaged {
                    let affects = name.rsplit('/').next().map(|id| (id.to_owned(), BTreeSet::new())).into_iter().collect();
                    report.problems.push(Problem { object: Some(name), what: error.report(), affects });
                }
                list.snapshots
            }
        };
        // Another process may have written since the repository was opened.
        self.repository.reload_index().await?;
        for (object, what) in self.repository.damaged_indexes() {
            report.problems.push(Problem { object: Some(object), what, affects: BTreeMap::new() });
        }
        let mut needs = Needs::default();
        let mut bytes = 0;
        for manifest in &manifests {
            report.snapshots.push(manifest.id.clone());
            bytes += manifest.bytes;
            self.gather(manifest, &mut needs, &mut report).await?;
        }
        let meter = PhaseMeter::start(Arc::clone(&self.progress), "packs", Total::estimate(0, bytes));
        for (id, wanted) in needs.packs {
            if self.cancel.is_cancelled() {
                return Err(Error::cancelled());
            }
            self.check_pack(id, wanted, &meter, &mut report).await?;
        }
        meter.finish();
        self.check_slices(&manifests, &mut report).await?;
        Ok(report)
    }

    /// Reads the slices of the oplog with which the snapshots can be rolled forward, and looks whether those are there that make a snapshot one state.
    async fn check_slices(&self, manifests: &[SnapshotManifest], report: &mut VerifyReport) -> Result<()> {
        for (set, stretches) in self.repository.all_stretches().await? {
            let of_set: Vec<&SnapshotManifest> = manifests.iter().filter(|manifest| manifest.replica_set == Some(set)).collect();
            for stretch in stretches.slices.into_keys() {
                if self.cancel.is_cancelled() {
                    return Err(Error::cancelled());
                }
                let needs = |manifest: &&&SnapshotManifest| manifest.resume_point.is_some_and(|from| stretch.last >= from);
                let affected: Vec<&&SnapshotManifest> = of_set.iter().filter(needs).collect();
                if affected.is_empty() {
                    continue;
                }
                report.slices += 1;
                match self.repository.slice(set, stretch).await {
                    Ok(_) => {}
                    Err(error) if is_damage(&error) => {
                        let mut problem = problem(&error, None);
                        problem.affects =
                            affected.iter().map(|manifest| (manifest.id.to_string(), [OPLOG.to_owned()].into())).collect();
                        report.problems.push(problem);
                    }
                    Err(error) => return Err(error),
                }
            }
        }
        for manifest in manifests.iter().filter(|manifest| matches!(manifest.consistency, Consistency::Window { .. })) {
            if Timeline::settling(&self.repository, manifest).await?.is_none() {
                let error = Error::corrupt("the oplog that makes the snapshot one state is missing from the archive");
                let owner = Owner { snapshot: manifest.id.to_string(), namespace: OPLOG.to_owned() };
                report.problems.push(problem(&error, Some(&owner)));
            }
        }
        Ok(())
    }

    /// Walks a snapshot's trees, noting which segments it needs and where they lie.
    async fn gather(&self, manifest: &SnapshotManifest, needs: &mut Needs, report: &mut VerifyReport) -> Result<()> {
        let owner = Owner { snapshot: manifest.id.to_string(), namespace: "(catalog)".to_owned() };
        if !self.gather_tree(&manifest.catalog, &owner, needs, report).await? {
            return Ok(());
        }
        let namespaces = match self.repository.namespaces(manifest).await {
            Ok(namespaces) => namespaces,
            Err(error) if is_damage(&error) => {
                report.problems.push(problem(&error, Some(&owner)));
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        let documents: u64 = namespaces.iter().map(crate::SnapshotNamespace::documents).sum();
        let bytes: u64 = namespaces.iter().map(crate::SnapshotNamespace::bytes).sum();
        if (documents, bytes, namespaces.len() as u64) != (manifest.documents, manifest.bytes, manifest.namespaces) {
            let error = Error::corrupt("the totals of the manifest are not the sums of its namespaces")
                .with_context("snapshot", &manifest.id);
            report.problems.push(problem(&error, Some(&owner)));
        }
        for namespace in &namespaces {
            if self.cancel.is_cancelled() {
                return Err(Error::cancelled());
            }
            let owner = Owner { namespace: namespace.namespace().to_string(), ..owner.clone() };
            self.gather_tree(&namespace.root, &owner, needs, report).await?;
        }
        Ok(())
    }

    async fn gather_tree(&self, root: &TreeRoot, owner: &Owner, needs: &mut Needs, report: &mut VerifyReport) -> Result<bool> {
        let mut sound = true;
        let (mut documents, mut bytes, mut segments) = (0, 0, 0_i64);
        let mut walk = self.repository.walk(root)?;
        loop {
            let entry = match walk.next().await {
                Ok(entry) => entry,
                Err(error) if is_damage(&error) => {
                    report.problems.push(problem(&error, Some(owner)));
                    return Ok(false);
                }
                Err(error) => return Err(error),
            };
            for node in walk.take_nodes() {
                sound &= self.need(Need { id: node, content: Content::Node, documents: 0, bytes: 0 }, owner, needs, report)?;
            }
            let Some(entry) = entry else { break };
            documents += entry.documents;
            bytes += entry.bytes;
            segments += 1;
            sound &= self.need(
                Need { id: entry.id, content: Content::Documents, documents: entry.documents, bytes: entry.bytes },
                owner,
                needs,
                report,
            )?;
        }
        let sums = (i64::try_from(documents).unwrap_or(-1), i64::try_from(bytes).unwrap_or(-1), segments);
        if sums != (root.documents, root.bytes, root.segments) {
            report.problems.push(problem(&Error::corrupt("a tree does not hold what its root says"), Some(owner)));
            sound = false;
        }
        Ok(sound)
    }

    fn need(&self, need: Need, owner: &Owner, needs: &mut Needs, report: &mut VerifyReport) -> Result<bool> {
        match self.repository.locate(need.id) {
            Ok(location) => {
                let wanted = needs.packs.entry(location.pack).or_default();
                wanted.segments.entry(need.id).or_insert((need, location));
                wanted.owners.insert(owner.clone());
                Ok(true)
            }
            Err(error) => {
                // One line for each namespace, not for each segment: a lost pack holds thousands.
                if needs.unlocated.insert(owner.clone()) {
                    report.problems.push(problem(&error, Some(owner)));
                }
                Ok(false)
            }
        }
    }

    async fn check_pack(&self, id: PackId, wanted: Wanted, meter: &PhaseMeter, report: &mut VerifyReport) -> Result<()> {
        let object = id.object()?;
        let bytes = match self.repository.archive().get(&object, None).await {
            Ok(bytes) => bytes,
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::CorruptData) => {
                report.problems.push(wanted.problem(&object.to_string(), "the pack is missing"));
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        report.packs += 1;
        let (repository, depth) = (self.repository.clone(), self.depth);
        let (findings, segments, documents, plain, wanted) = tokio::task::spawn_blocking(move || {
            let mut findings = Vec::new();
            if let Err(error) = id.check(&bytes) {
                findings.push(error.report());
            }
            if let Err(error) = pack::directory(&bytes, repository.config().cipher.as_ref()) {
                findings.push(error.report());
            }
            let (mut documents, mut plain) = (0, 0);
            let mut decompressor = Decompressor::new()?;
            let mut needed: Vec<&(Need, Location)> = wanted.segments.values().collect();
            if depth == Depth::Quick {
                needed.clear();
            }
            needed.sort_unstable_by_key(|(_, location)| (location.block.offset, location.offset));
            for same_block in needed.chunk_by(|(_, a), (_, b)| a.block == b.block) {
                let Some((_, first)) = same_block.first() else { continue };
                let range = first.block.offset as usize..first.block.offset as usize + first.block.stored as usize;
                if range.end > bytes.len() {
                    findings.push("the pack is truncated".to_owned());
                    break;
                }
                let block = match repository.decode_block(&mut decompressor, first, &bytes.slice(range)) {
                    Ok(block) => block,
                    Err(error) => {
                        findings.push(error.report());
                        continue;
                    }
                };
                for (need, location) in same_block {
                    let segment = repository.segment_of(need.content, location, &block);
                    match segment.and_then(|segment| need.check(&segment)) {
                        Ok((count, size)) => {
                            documents += count;
                            plain += size;
                        }
                        Err(error) => findings.push(error.report()),
                    }
                }
                if findings.len() > FINDINGS_A_PACK {
                    break;
                }
            }
            Ok::<_, Error>((findings, wanted.segments.len() as u64, documents, plain, wanted))
        })
        .await??;
        report.segments += segments;
        report.documents += documents;
        report.bytes += plain;
        meter.advance(documents, plain);
        for finding in findings {
            report.problems.push(wanted.problem(&object.to_string(), &finding));
        }
        Ok(())
    }
}

/// What the snapshots need, by pack.
#[derive(Default)]
struct Needs {
    packs: BTreeMap<PackId, Wanted>,
    unlocated: BTreeSet<Owner>,
}

#[derive(Default)]
struct Wanted {
    segments: HashMap<SegmentId, (Need, Location)>,
    owners: BTreeSet<Owner>,
}

impl Wanted {
    fn problem(&self, object: &str, what: &str) -> Problem {
        let mut affects: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for owner in &self.owners {
            affects.entry(owner.snapshot.clone()).or_default().insert(owner.namespace.clone());
        }
        Problem { object: Some(object.to_owned()), what: what.to_owned(), affects }
    }
}

#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Owner {
    snapshot: String,
    namespace: String,
}

#[derive(Clone, Copy)]
struct Need {
    id: SegmentId,
    content: Content,
    documents: u64,
    bytes: u64,
}

impl Need {
    fn check(&self, plain: &[u8]) -> Result<(u64, u64)> {
        if self.content == Content::Node {
            return Ok((0, 0));
        }
        let mut documents = 0;
        for document in documents_of(plain) {
            check_structure(document?)?;
            documents += 1;
        }
        if (documents, plain.len() as u64) != (self.documents, self.bytes) {
            return Err(
                Error::corrupt("a segment does not hold what its tree says").with_context("segment", format!("{:?}", self.id))
            );
        }
        Ok((documents, plain.len() as u64))
    }
}

fn is_damage(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::CorruptData | ErrorKind::Unsupported)
}

fn problem(error: &Error, owner: Option<&Owner>) -> Problem {
    let object = std::iter::successors(Some(error), |error| {
        std::error::Error::source(*error).and_then(|source| source.downcast_ref::<Error>())
    })
    .flat_map(Error::context)
    .find_map(|(key, value)| (key == "object").then(|| value.to_owned()));
    let affects = owner.map(|owner| (owner.snapshot.clone(), BTreeSet::from([owner.namespace.clone()]))).into_iter().collect();
    Problem { object, what: error.report(), affects }
}

const FINDINGS_A_PACK: usize = 10;
