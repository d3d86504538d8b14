//! Carrying out a batch, in one of three ways.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fmt,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use futures_util::TryStreamExt as _;
use mongodb::{
    bson::{RawArrayBuf, RawDocument, RawDocumentBuf, cstr, rawdoc},
    options::WriteConcern,
};
use tokio_util::sync::CancellationToken;

use super::{
    Missing, ReplayTarget, ReplayTotals,
    batch::{Batch, Change, Step},
    update::Update,
};
use crate::{
    connect::{Deployment, ServerVersion, Topology},
    error::{Error, ErrorKind, Result, classify_code},
    lock::lock,
    namespace::Namespace,
    retry::{RetryBudget, RetryPolicy, retry},
    transfer::{
        partition::Key,
        raw::{self, OwnedId, Writer},
        write::{Refused, WriteMode, WriteTarget},
    },
};

/// How updates of an oplog are applied to a target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum ApplyPath {
    /// The command `applyOps` with some hundreds of operations: replica sets from 5.0 on, for whoever may run it (the action `applyOps`
    /// on the cluster, `bypassDocumentValidation`, and the actions of the operations themselves; `root` has them). New documents go by
    /// `insert` where there are several. The fastest.
    ApplyOps,
    /// Update pipelines with the stage by which the server itself applies differences: from 6.0 on, with the role `readWrite`.
    Pipelines,
    /// Documents are read, changed here and written back: any server, with the role `readWrite`. The slowest.
    Ourselves,
}

impl ApplyPath {
    /// The path that was asked for, or the fastest that the target allows.
    pub(super) async fn choose(target: &Deployment, wanted: Option<Self>) -> Result<Self> {
        for path in [Self::ApplyOps, Self::Pipelines, Self::Ourselves] {
            if wanted.is_none_or(|wanted| wanted == path) && path.is_possible(target).await? {
                return Ok(path);
            }
        }
        Err(Error::new(ErrorKind::Unsupported, "the target does not apply updates in the way asked for: leave the choice open")
            .with_context("path", format!("{wanted:?}"))
            .with_context("version", target.server_version()))
    }

    async fn is_possible(self, target: &Deployment) -> Result<bool> {
        let admin = target.database("admin");
        let tried = match self {
            Self::ApplyOps => {
                // What newer servers do with updates of missing documents was not tried.
                let version = target.server_version();
                let is_known = version >= ServerVersion::new(5, 0, 0) && version < ServerVersion::new(7, 0, 0);
                if !is_known || !matches!(target.topology(), Topology::ReplicaSet(_)) {
                    return Ok(false);
                }
                // To delete nothing from a collection that does not exist takes the privileges of an operation, and no more.
                let nothing = rawdoc! { "op": "d", "ns": "mongo_core.probe", "o": { "_id": "mongo-core" } };
                let command = rawdoc! { "applyOps": [nothing], "alwaysUpsert": false, "bypassDocumentValidation": true };
                admin.run_raw_command(command).await
            }
            Self::Pipelines => {
                let difference = rawdoc! { "$v": 2, "diff": { "u": { "probe": 1 } } };
                let update = rawdoc! { "q": { "_id": "mongo-core" }, "u": [stage(&difference)] };
                admin.run_raw_command(rawdoc! { "update": "mongo_core.probe", "updates": [update] }).await
            }
            Self::Ourselves => return Ok(true),
        };
        match tried.map_err(Error::from) {
            Ok(reply) => Ok(!reply.contains_key("writeErrors")),
            Err(error) if error.is_retryable() => Err(error),
            Err(_) => Ok(false),
        }
    }
}

fn stage(update: &RawDocument) -> RawDocumentBuf {
    rawdoc! { "$_internalApplyOplogUpdate": { "oplogUpdate": update.to_owned() } }
}

/// Applies batches to a target.
pub(super) struct Applier {
    target: Deployment,
    path: ApplyPath,
    retry: RetryPolicy,
    retry_budget: RetryBudget,
    cancel: CancellationToken,
    missing: Mutex<BTreeMap<Namespace, HashSet<OwnedId>>>,
    operations: AtomicU64,
    sent: AtomicU64,
}

impl fmt::Debug for Applier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Applier").field("path", &self.path).finish_non_exhaustive()
    }
}

impl Applier {
    pub(super) fn new(
        target: Deployment,
        path: ApplyPath,
        (retry, retry_budget): (RetryPolicy, RetryBudget),
        cancel: CancellationToken,
    ) -> Self {
        let (operations, sent) = Default::default();
        Self { target, path, retry, retry_budget, cancel, missing: Mutex::default(), operations, sent }
    }

    pub(super) fn path(&self) -> ApplyPath {
        self.path
    }

    pub(super) fn target(&self) -> &Deployment {
        &self.target
    }

    /// By the primary alone: a majority is waited for once for many. A standalone server has only its journal.
    fn write_concern(&self) -> WriteConcern {
        let mut concern = WriteConcern::nodes(1);
        concern.journal = (*self.target.topology() == Topology::Standalone).then_some(true);
        concern
    }

    fn raw_write_concern(&self) -> RawDocumentBuf {
        match self.target.topology() {
            Topology::Standalone => rawdoc! { "w": 1, "j": true },
            _ => rawdoc! { "w": 1 },
        }
    }

    pub(super) fn totals(&self) -> ReplayTotals {
        ReplayTotals { operations: self.operations.load(Relaxed), sent: self.sent.load(Relaxed) }
    }

    pub(super) fn missing(&self) -> Result<Vec<Missing>> {
        let missing = lock(&self.missing);
        let each = missing.iter().flat_map(|(namespace, ids)| ids.iter().map(move |id| (namespace, id)));
        each.map(|(namespace, id)| Ok(Missing { namespace: namespace.clone(), id: id.to_key()? })).collect()
    }

    pub(super) fn note_missing(&self, namespace: &Namespace, id: &Key) -> Result<()> {
        self.note(namespace, OwnedId::of(raw::id_of(id.as_document())?));
        Ok(())
    }

    fn note(&self, namespace: &Namespace, id: OwnedId) {
        let mut missing = lock(&self.missing);
        missing.entry(namespace.clone()).or_default().insert(id);
    }

    /// What was missing may be put or deleted now.
    fn forget_settled(&self, steps: &[Step]) {
        let mut missing = lock(&self.missing);
        if missing.is_empty() {
            return;
        }
        for step in steps.iter().filter(|step| !matches!(step.change, Change::Update(_))) {
            if let Some(ids) = missing.get_mut(&step.target.namespace) {
                ids.remove(&step.id);
                if ids.is_empty() {
                    missing.remove(&step.target.namespace);
                }
            }
        }
    }

    /// Applies a batch. What is applied twice, because its reply was lost, is as if applied once.
    pub(super) async fn apply(&self, batch: Batch) -> Result<()> {
        self.operations.fetch_add(batch.len() as u64, Relaxed);
        let steps = batch.needed();
        self.sent.fetch_add(steps.len() as u64, Relaxed);
        retry(&self.retry, &self.retry_budget, &self.cancel, |_| self.try_apply(&steps)).await
    }

    async fn try_apply(&self, steps: &[Step]) -> Result<()> {
        self.forget_settled(steps);
        match self.path {
            ApplyPath::ApplyOps => {
                let (new, others) = new_documents(steps);
                self.apply_ops(&others).await?;
                self.apply_all(&new).await
            }
            ApplyPath::Pipelines | ApplyPath::Ourselves => self.apply_all(&steps.iter().collect::<Vec<_>>()).await,
        }
    }

    async fn apply_ops(&self, steps: &[&Step]) -> Result<()> {
        let operations: Vec<Vec<RawDocumentBuf>> = steps.iter().map(|step| operations(step)).collect::<Result<_>>()?;
        let mut rest: (&[&Step], &[Vec<RawDocumentBuf>]) = (steps, &operations);
        while !rest.0.is_empty() {
            let mut bytes = 0;
            let count = rest.1.iter().take_while(|operations| {
                bytes += operations.iter().map(|operation| operation.as_bytes().len() + 16).sum::<usize>();
                bytes <= MAX_OPERATIONS_BYTES
            });
            let count = count.count().max(1);
            let ((now, later), (operations, others)) = (rest.0.split_at(count), rest.1.split_at(count));
            match self.send_operations(operations).await {
                Ok(()) => {}
                Err(error) if error.is_retryable() => return Err(error),
                // Operations on documents alone are applied all or not at all, and what is applied twice is as if applied once. What
                // stood in the way, single commands tell; most often a document is missing.
                Err(error) => {
                    tracing::debug!(error = %error.report(), operations = now.len(), "a batch is applied by other commands");
                    self.apply_all(now).await?;
                }
            }
            rest = (later, others);
        }
        Ok(())
    }

    async fn send_operations(&self, operations: &[Vec<RawDocumentBuf>]) -> Result<()> {
        let tail = rawdoc! { "alwaysUpsert": false, "bypassDocumentValidation": true, "writeConcern": { "w": 1 } };
        let operations = operations.iter().flatten().map(AsRef::as_ref);
        let command = raw::command_with(&RawDocumentBuf::new(), "applyOps", operations, &tail)?;
        self.target.database("admin").run_raw_command(command).await?;
        Ok(())
    }

    /// By commands for one collection each.
    async fn apply_all(&self, steps: &[&Step]) -> Result<()> {
        let mut by_target: BTreeMap<&Namespace, Vec<&Step>> = BTreeMap::new();
        for step in steps {
            by_target.entry(&step.target.namespace).or_default().push(step);
        }
        for steps in by_target.into_values() {
            let Some(first) = steps.first() else { continue };
            let target = &*first.target;
            if target.in_order {
                // Runs of one kind, each in order.
                for run in steps.chunk_by(|a, b| std::mem::discriminant(&a.change) == std::mem::discriminant(&b.change)) {
                    self.apply_to(target, run).await?;
                }
            } else {
                self.apply_to(target, &steps).await?;
            }
        }
        Ok(())
    }

    /// Deletes come first: of two `_id`s that have one place in the index, the other was deleted before this was put.
    async fn apply_to(&self, target: &ReplayTarget, steps: &[&Step]) -> Result<()> {
        let (mut deleted, mut put, mut updated) = (Vec::new(), Vec::new(), Vec::new());
        for step in steps {
            match &step.change {
                Change::Delete => deleted.push(&step.id),
                Change::Insert(document) => put.push((&step.id, Put { document: document.clone(), is_new: true })),
                Change::Put(document) => put.push((&step.id, Put { document: document.clone(), is_new: false })),
                Change::Update(update) => updated.push((&step.id, update)),
            }
        }
        self.delete(target, &deleted).await?;
        let ours = |update: &RawDocument| {
            self.path != ApplyPath::Pipelines || !matches!(Update::parse(update), Ok(Update::Difference(_)))
        };
        let (by_us, by_server): (Vec<_>, Vec<_>) =
            if updated.iter().any(|(_, update)| ours(update)) { (updated, Vec::new()) } else { (Vec::new(), updated) };
        let were_found = !by_us.is_empty();
        let put = self.update_ourselves(target, put, &by_us).await?;
        if target.in_order {
            let documents: Vec<&RawDocument> = put.iter().map(|put| &*put.document).collect();
            // In a capped collection what is inserted and is there stays where it is; what is updated was found there.
            match were_found {
                true => self.replace(target, &documents).await?,
                false => self.insert_in_order(target, documents).await?,
            }
        } else {
            let (new, known): (Vec<&Put>, Vec<&Put>) = put.iter().partition(|put| put.is_new);
            // Of a new document's unique values one may have been another's until now.
            self.replace(target, &known.iter().map(|put| &*put.document).collect::<Vec<_>>()).await?;
            self.insert(target, &new.iter().map(|put| &*put.document).collect::<Vec<_>>()).await?;
        }
        self.update_by_pipelines(target, &by_server).await
    }

    async fn delete(&self, target: &ReplayTarget, ids: &[&OwnedId]) -> Result<()> {
        // From 5.0 on the oplog tells what a capped collection has dropped at its beginning; before 6.0 it refuses deletes, and drops
        // the same by itself.
        if target.in_order && self.target.server_version() < ServerVersion::new(6, 0, 0) {
            return Ok(());
        }
        let statement = |id: &&OwnedId| Ok(rawdoc! { "q": { "_id": id.as_element().alone_as("$eq")? }, "limit": 1 });
        let statements: Vec<RawDocumentBuf> = ids.iter().map(statement).collect::<Result<_>>()?;
        let head = rawdoc! { "delete": target.namespace.collection() };
        let tail = rawdoc! { "ordered": false, "writeConcern": self.raw_write_concern() };
        self.send(target, &head, "deletes", &statements, &tail).await.map(drop)
    }

    fn writing(&self, target: &ReplayTarget, mode: WriteMode) -> WriteTarget {
        let mut write = WriteTarget::new(self.target.clone(), target.namespace.clone());
        write.mode = mode;
        write.ordered = target.in_order;
        write.bypass_validation = true;
        write.write_concern = self.write_concern();
        write
    }

    /// Writes documents that are most likely not there, and where one is, in its place.
    async fn insert(&self, target: &ReplayTarget, documents: &[&RawDocument]) -> Result<()> {
        if documents.is_empty() {
            return Ok(());
        }
        let refused = self.writing(target, WriteMode::Insert).write(documents).await?.refused;
        let refused: Vec<&RawDocument> = refused.iter().filter_map(|refused| documents.get(refused.index).copied()).collect();
        self.replace(target, &refused).await
    }

    /// Writes documents in place of what has the `_id`.
    async fn replace(&self, target: &ReplayTarget, documents: &[&RawDocument]) -> Result<()> {
        if documents.is_empty() {
            return Ok(());
        }
        let outcome = self.writing(target, WriteMode::Upsert).write(documents).await?;
        outcome.refused.first().map_or(Ok(()), |refused| Err(refusal(target, refused)))
    }

    /// Writes documents one after the other, those that are there excepted.
    async fn insert_in_order(&self, target: &ReplayTarget, mut documents: Vec<&RawDocument>) -> Result<()> {
        let write = self.writing(target, WriteMode::Insert);
        while !documents.is_empty() {
            let outcome = write.write(&documents).await?;
            match outcome.refused.first() {
                None => return Ok(()),
                Some(refused) if refused.is_duplicate_id() => drop(documents.drain(..=refused.index.min(documents.len() - 1))),
                Some(refused) => return Err(refusal(target, refused)),
            }
        }
        Ok(())
    }

    /// Updates by the server's own stage; sees to it that each finds its document.
    async fn update_by_pipelines(&self, target: &ReplayTarget, updates: &[(&OwnedId, &RawDocumentBuf)]) -> Result<()> {
        let mut statements = Vec::with_capacity(updates.len());
        for (id, update) in updates {
            let mut stages = RawArrayBuf::new();
            stages.push(stage(update));
            let mut statement = rawdoc! { "q": { "_id": id.as_element().alone_as("$eq")? } };
            statement.append(cstr!("u"), stages);
            statements.push(statement);
        }
        let head = rawdoc! { "update": target.namespace.collection() };
        let tail = rawdoc! { "ordered": true, "bypassDocumentValidation": true, "writeConcern": self.raw_write_concern() };
        let matched = self.send(target, &head, "updates", &statements, &tail).await?;
        if matched < updates.len() as u64 {
            let ids: HashSet<&OwnedId> = updates.iter().map(|(id, _)| *id).collect();
            self.find(target, ids.into_iter().collect(), &rawdoc! { "_id": 1 }).await?;
        }
        Ok(())
    }

    /// Applies updates to documents that are about to be put, or that are read for it. Gives all that are to be put.
    async fn update_ourselves(
        &self,
        target: &ReplayTarget,
        put: Vec<(&OwnedId, Put)>,
        updates: &[(&OwnedId, &RawDocumentBuf)],
    ) -> Result<Vec<Put>> {
        let mut order: Vec<&OwnedId> = Vec::with_capacity(put.len());
        let mut documents: HashMap<&OwnedId, Put> = HashMap::with_capacity(put.len());
        for (id, put) in put {
            order.push(id);
            documents.insert(id, put);
        }
        let wanted: HashSet<&OwnedId> = updates.iter().map(|(id, _)| *id).filter(|id| !documents.contains_key(id)).collect();
        if !wanted.is_empty() {
            for (id, document) in self.find(target, wanted.into_iter().collect(), &RawDocumentBuf::new()).await? {
                order.push(id);
                documents.insert(id, Put { document, is_new: false });
            }
        }
        for (id, update) in updates {
            if let Some(put) = documents.get_mut(id) {
                put.document = Update::parse(update)?.apply(&put.document)?;
            }
        }
        // A document that was put twice stands here twice, and is there once.
        Ok(order.into_iter().filter_map(|id| documents.remove(id)).collect())
    }

    /// Reads documents, and notes those that are missing.
    async fn find<'a>(
        &self,
        target: &ReplayTarget,
        ids: Vec<&'a OwnedId>,
        projection: &RawDocument,
    ) -> Result<Vec<(&'a OwnedId, RawDocumentBuf)>> {
        let database = self.target.database(target.namespace.database());
        let mut found = Vec::with_capacity(ids.len());
        for some in ids.chunks(IDS_AT_ONCE) {
            // In a list the server takes such a value for an operator.
            let (alone, together): (Vec<_>, Vec<_>) = some.iter().copied().partition(|id| id.is_like_operator());
            let mut filters = Vec::new();
            if !together.is_empty() {
                let ids: Vec<_> = together.iter().map(|id| id.as_element()).collect();
                filters.push((rawdoc! { "_id": raw::array_as("$in", &ids)? }, together));
            }
            for id in alone {
                filters.push((rawdoc! { "_id": id.as_element().alone_as("$eq")? }, vec![id]));
            }
            for (filter, wanted) in filters {
                let mut wanted: HashMap<OwnedId, &OwnedId> = wanted.into_iter().map(|id| (id.clone(), id)).collect();
                let mut command = rawdoc! { "find": target.namespace.collection() };
                command.append(cstr!("filter"), filter);
                command.append(cstr!("projection"), projection.to_owned());
                let mut batches = database.run_raw_cursor_command(command).batch().await?;
                while let Some(batch) = batches.try_next().await? {
                    for document in raw::documents_in(batch.doc_slices()?)? {
                        let document = document?;
                        let id = OwnedId::of(raw::id_of(document)?);
                        // A number of another type is the same `_id`.
                        let same = wanted.remove(&id).or_else(|| {
                            let key = Key::of(document).ok()?;
                            let same =
                                wanted.keys().find(|id| id.to_key().is_ok_and(|other| other.compare(&key).is_eq())).cloned();
                            wanted.remove(&same?)
                        });
                        found.extend(same.map(|id| (id, document.to_owned())));
                    }
                }
                // What a capped collection has dropped at its beginning it need not tell.
                for id in wanted.into_keys().filter(|_| !target.in_order) {
                    self.note(&target.namespace, id);
                }
            }
        }
        Ok(found)
    }

    /// Sends statements in as many commands as it takes; gives how many documents they met.
    async fn send(
        &self,
        target: &ReplayTarget,
        head: &RawDocument,
        list: &str,
        statements: &[RawDocumentBuf],
        tail: &RawDocument,
    ) -> Result<u64> {
        let database = self.target.database(target.namespace.database());
        let mut rest = statements;
        let mut met = 0;
        while !rest.is_empty() {
            let mut bytes = 0;
            let count = rest.iter().take_while(|statement| {
                bytes += statement.as_bytes().len() + 16;
                bytes <= MAX_BYTES
            });
            let (now, later) = rest.split_at(count.count().max(1));
            let command = raw::command_with(head, list, now.iter().map(AsRef::as_ref), tail)?;
            let reply = database
                .run_raw_command(command)
                .await
                .map_err(|error| Error::from(error).with_context("namespace", &target.namespace))?;
            let refused = reply.get_array("writeErrors").ok().and_then(|errors| errors.first()?.as_document());
            if let Some(refused) = refused {
                let code = crate::connect::error_code(refused);
                return Err(Error::new(classify_code(code), "the target refuses an operation of the oplog")
                    .with_context("code", code)
                    .with_context("namespace", &target.namespace));
            }
            met += crate::connect::integer(&reply, "n").and_then(|n| u64::try_from(n).ok()).unwrap_or(0);
            rest = later;
        }
        Ok(met)
    }
}

/// A document as it is to be.
struct Put {
    document: RawDocumentBuf,
    /// Whether it is most likely not there.
    is_new: bool,
}

/// Parts what the command `insert` is for, which is several times as fast as `applyOps`: documents that are new, with what is done to them later.
/// What else there is can come before it, and must where one of a new document's unique values is set free.
fn new_documents(steps: &[Step]) -> (Vec<&Step>, Vec<&Step>) {
    let mut new: HashMap<&ReplayTarget, HashSet<&OwnedId>> = HashMap::new();
    for step in steps.iter().filter(|step| !step.target.in_order) {
        // Changing a large document anew for each update is dearer than what the command spares.
        if matches!(&step.change, Change::Insert(document) if document.as_bytes().len() <= LARGE) {
            new.entry(&step.target).or_default().insert(&step.id);
        }
    }
    new.retain(|_, ids| ids.len() >= WORTH_A_COMMAND);
    steps.iter().partition(|step| new.get(&*step.target).is_some_and(|ids| ids.contains(&step.id)))
}

fn refusal(target: &ReplayTarget, refused: &Refused) -> Error {
    Error::new(refused.kind, "the target refuses a document of the oplog")
        .with_context("code", refused.code)
        .with_context("namespace", &target.namespace)
}

/// A step as `applyOps` takes it.
fn operations(step: &Step) -> Result<Vec<RawDocumentBuf>> {
    let namespace = step.target.namespace.to_string();
    let id = || step.id.as_element().alone_as("_id");
    Ok(match &step.change {
        Change::Delete => vec![rawdoc! { "op": "d", "ns": namespace, "o": id()? }],
        Change::Update(update) => vec![rawdoc! { "op": "u", "ns": namespace, "o2": id()?, "o": update.clone() }],
        Change::Insert(document) | Change::Put(document) => {
            let put = rawdoc! { "op": "i", "ns": namespace.as_str(), "o": document.clone() };
            let mut empty_timestamps = Writer::new(64);
            let mut is_delicate = false;
            for field in raw::elements(document) {
                let field = field?;
                if field.is_empty_timestamp() && field.name != b"_id" {
                    empty_timestamps.element(field);
                    is_delicate = true;
                }
            }
            if !is_delicate {
                return Ok(vec![put]);
            }
            let empty_timestamps = RawDocumentBuf::from_bytes(empty_timestamps.finish()?)?;
            // In their place a server may put the time when it inserts, but not when it applies a difference.
            let restored = rawdoc! { "$v": 2, "diff": { "u": empty_timestamps } };
            vec![put, rawdoc! { "op": "u", "ns": namespace, "o2": id()?, "o": restored }]
        }
    })
}

/// All of them become one entry of the oplog, to which the server adds a UUID each; one of 16 MiB and 16,000 bytes it writes, and cannot read
/// any more (tried on 5.0.4 to 6.0.27).
const MAX_OPERATIONS_BYTES: usize = 12 << 20;
/// A command's body may have 16 MiB and 16 KiB.
const MAX_BYTES: usize = 16 << 20;
const IDS_AT_ONCE: usize = 1000;
/// For fewer new documents of one collection a command of their own is not worth its way.
const WORTH_A_COMMAND: usize = 8;
const LARGE: usize = 64 << 10;
