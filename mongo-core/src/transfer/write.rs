//! Raw bulk writes with an outcome for every document that was refused.
//!
//! The driver's `insert_many` cannot send `bypassEmptyTsReplacement` and its `bulk_write` takes decoded documents, so
//! the commands are built here from raw bytes.

use std::collections::HashSet;

use mongodb::{
    ClientSession,
    bson::{Bson, Document, RawArrayBuf, RawDocument, RawDocumentBuf, cstr, rawdoc},
    options::WriteConcern,
};

use super::{majority::OpTime, partition::Key, raw};
use crate::{
    connect::Deployment,
    error::{Error, ErrorKind, Result, classify_code},
    namespace::Namespace,
};

/// What to do with a document whose `_id` the target has already.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum WriteMode {
    /// Insert; an existing `_id` refuses the document.
    #[default]
    Insert,
    /// Insert, or replace the whole document that has the `_id`.
    Upsert,
}

/// Where and how to write.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct WriteTarget {
    /// The deployment.
    pub deployment: Deployment,
    /// The collection; for a time-series collection that of its buckets.
    pub namespace: Namespace,
    /// What to do with an existing `_id`.
    pub mode: WriteMode,
    /// Whether documents that the collection's validator refuses are written all the same. Needs the role `restore` or
    /// the action `bypassDocumentValidation`. Default no.
    pub bypass_validation: bool,
    /// Whether documents are written one after the other, stopping at the first refusal. Default no.
    pub ordered: bool,
    /// The write concern of every batch. Default majority.
    pub write_concern: WriteConcern,
    /// Whether the server keeps `Timestamp(0, 0)` when asked (see [`keeps_empty_timestamps`]).
    pub keeps_empty_timestamps: bool,
}

impl WriteTarget {
    /// Inserts into `namespace`, unordered, with majority acknowledgement.
    pub fn new(deployment: Deployment, namespace: Namespace) -> Self {
        let keeps_empty_timestamps = keeps_empty_timestamps(&deployment);
        Self {
            deployment,
            namespace,
            mode: WriteMode::Insert,
            bypass_validation: false,
            ordered: false,
            write_concern: WriteConcern::majority(),
            keeps_empty_timestamps,
        }
    }
}

/// Whether the server knows `bypassEmptyTsReplacement`: 8.0, 7.0.13, 6.0.17 and 5.0.29 on, and patch releases since. Without it a
/// top-level `Timestamp(0, 0)` in an insert becomes the current time (SERVER-88750), so such documents go another way.
pub fn keeps_empty_timestamps(deployment: &Deployment) -> bool {
    use crate::connect::ServerVersion;
    let version = deployment.server_version();
    match (version.major, version.minor) {
        (5, 0) => version >= ServerVersion::new(5, 0, 29),
        (6, 0) => version >= ServerVersion::new(6, 0, 17),
        (7, 0) => version >= ServerVersion::new(7, 0, 13),
        (major, _) => major >= 8,
    }
}

/// What became of a batch.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct WriteOutcome {
    /// Documents that the target now holds as they were given.
    pub written: u64,
    /// Documents that it refused.
    pub refused: Vec<Refused>,
    /// Where in the oplog of a replica set the last write came to stand. See [`PendingMajority`](super::majority::PendingMajority).
    pub op_time: Option<OpTime>,
}

/// A document that the target refused.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Refused {
    /// Its position in the batch.
    pub index: usize,
    /// Its `_id`.
    pub id: Key,
    /// The server's error code: 11000 for a duplicate key, 121 for a validator.
    pub code: i32,
    /// What the code means for the caller.
    pub kind: ErrorKind,
    /// The pattern and the values of the unique index that refused it, where the server told them.
    pub duplicate: Option<Duplicate>,
}

/// The place in a unique index that was taken.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Duplicate {
    /// The index's key pattern.
    pub pattern: Document,
    /// The values that were taken.
    pub value: Document,
}

impl Refused {
    /// Whether the refusal is that the `_id` exists.
    pub fn is_duplicate_id(&self) -> bool {
        self.duplicate.as_ref().is_some_and(|duplicate| duplicate.pattern.len() == 1 && duplicate.pattern.contains_key("_id"))
    }
}

impl WriteTarget {
    /// Writes a batch of documents, in as many commands as it takes.
    ///
    /// Give at most a few thousand documents or a few MiB at a time: the batch is in memory already, and the commands
    /// copy it once more. Not retried: a write whose reply was lost may have been applied, and only the caller knows
    /// whether doing it twice does harm ([`WriteMode::Upsert`] is idempotent).
    ///
    /// # Errors
    /// The server's own when a command fails as a whole, [`ErrorKind::Conflict`] when another primary was elected between
    /// two commands, and [`ErrorKind::Timeout`] or [`ErrorKind::Unavailable`] when
    /// the write concern was not satisfied; then an unknown part of the batch was written. A refused document is no error.
    ///
    /// # Cancel safety
    /// If the future is dropped, an unknown part of the batch is written.
    pub async fn write(&self, documents: &[&RawDocument]) -> Result<WriteOutcome> {
        self.write_with(documents, None).await
    }

    /// The same within the transaction of a session, whose write concern counts. A refused document aborts the transaction, so it is written in order.
    ///
    /// # Errors
    /// As [`write`](Self::write); one with the label `TransientTransactionError` means that the whole transaction may be tried again.
    ///
    /// # Cancel safety
    /// If the future is dropped, abort the transaction.
    pub async fn write_in(&self, session: &mut ClientSession, documents: &[&RawDocument]) -> Result<WriteOutcome> {
        self.write_with(documents, Some(session)).await
    }

    async fn write_with(&self, documents: &[&RawDocument], mut session: Option<&mut ClientSession>) -> Result<WriteOutcome> {
        let mut outcome = WriteOutcome::default();
        let all: Vec<(usize, &RawDocument)> = documents.iter().copied().enumerate().collect();
        let mut delicate = Vec::new();
        for (index, document) in &all {
            if self.is_delicate(document)? {
                delicate.push((*index, *document));
            }
        }
        match self.mode {
            WriteMode::Insert => {
                self.write_split(&all, Statement::Insert, &mut outcome, session.as_deref_mut()).await?;
                let refused: HashSet<usize> = outcome.refused.iter().map(|refused| refused.index).collect();
                let stopped_at = if self.ordered { refused.iter().min().copied() } else { None };
                delicate.retain(|(index, _)| !refused.contains(index) && stopped_at.is_none_or(|stop| *index < stop));
                let mut corrected = WriteOutcome::default();
                self.write_split(&delicate, Statement::Correct, &mut corrected, session).await?;
                outcome.written -= corrected.refused.len() as u64;
                outcome.refused.extend(corrected.refused);
                outcome.op_time = OpTime::later_of(outcome.op_time, corrected.op_time)?;
            }
            WriteMode::Upsert if delicate.is_empty() => {
                self.write_split(&all, Statement::Replace, &mut outcome, session).await?;
            }
            WriteMode::Upsert => {
                let plain: Vec<_> =
                    all.into_iter().filter(|(index, _)| !delicate.iter().any(|(other, _)| other == index)).collect();
                self.write_split(&plain, Statement::Replace, &mut outcome, session.as_deref_mut()).await?;
                self.write_split(&delicate, Statement::ReplaceLiterally, &mut outcome, session).await?;
            }
        }
        Ok(outcome)
    }

    /// Whether the ordinary command would change the document: an insert or a replacement puts the time in place of a
    /// top-level `Timestamp(0, 0)`, and a replacement takes a first field with `$` for an operator. `$literal` in an update
    /// pipeline does neither.
    fn is_delicate(&self, document: &RawDocument) -> Result<bool> {
        let upsert = self.mode == WriteMode::Upsert;
        if self.keeps_empty_timestamps && !upsert {
            return Ok(false);
        }
        for element in raw::elements(document) {
            let element = element?;
            if (element.is_empty_timestamp() && element.name != b"_id") || (upsert && element.name.starts_with(b"$")) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    pub(super) async fn write_split(
        &self,
        documents: &[(usize, &RawDocument)],
        statement: Statement,
        outcome: &mut WriteOutcome,
        mut session: Option<&mut ClientSession>,
    ) -> Result<()> {
        let mut rest = documents;
        while !rest.is_empty() {
            let mut bytes = 0;
            let count = rest
                .iter()
                .take(MAX_DOCUMENTS)
                .take_while(|(_, document)| {
                    bytes += document.as_bytes().len() + OVERHEAD_A_DOCUMENT;
                    bytes <= MAX_BYTES
                })
                .count()
                // A document that fills a command alone still goes: the server leaves 16 KiB for the rest.
                .max(1);
            let (batch, after) = rest.split_at(count);
            self.write_halving(batch, statement, outcome, session.as_deref_mut()).await?;
            if self.ordered && !outcome.refused.is_empty() {
                return Ok(());
            }
            rest = after;
        }
        Ok(())
    }

    /// Sends one command, and halves it while the server calls the command or its own reply too large.
    async fn write_halving(
        &self,
        documents: &[(usize, &RawDocument)],
        statement: Statement,
        outcome: &mut WriteOutcome,
        mut session: Option<&mut ClientSession>,
    ) -> Result<()> {
        let mut pending = vec![documents];
        while let Some(batch) = pending.pop() {
            match self.send(batch, statement, session.as_deref_mut()).await {
                Ok(reply) => self.take_reply(batch, statement, &reply, outcome)?,
                Err(error) if matches!(error.server_code(), Some(10334 | 17260 | 17280)) && batch.len() > 1 => {
                    let (first, second) = batch.split_at(batch.len() / 2);
                    pending.push(second);
                    pending.push(first);
                }
                Err(error) if matches!(error.server_code(), Some(10334)) => {
                    let (index, document) = batch[0];
                    outcome.refused.push(Refused {
                        index,
                        id: Key::of(document)?,
                        code: 10334,
                        kind: ErrorKind::Rejected,
                        duplicate: None,
                    });
                }
                Err(error) => return Err(error.with_context("namespace", &self.namespace)),
            }
        }
        Ok(())
    }

    async fn send(
        &self,
        documents: &[(usize, &RawDocument)],
        statement: Statement,
        session: Option<&mut ClientSession>,
    ) -> Result<Document> {
        let collection = self.namespace.collection();
        let mut tail = rawdoc! { "ordered": self.ordered || session.is_some() };
        if self.bypass_validation {
            tail.append(cstr!("bypassDocumentValidation"), true);
        }
        if self.keeps_empty_timestamps {
            tail.append(cstr!("bypassEmptyTsReplacement"), true);
        }
        if session.is_none() {
            tail.append(cstr!("writeConcern"), write_concern_document(&self.write_concern));
        }
        let command = if statement == Statement::Insert {
            let documents = documents.iter().map(|(_, document)| *document);
            raw::command_with(&rawdoc! { "insert": collection }, "documents", documents, &tail)?
        } else {
            let updates: Vec<RawDocumentBuf> =
                documents.iter().map(|(_, document)| update_statement(document, statement)).collect::<Result<_>>()?;
            let updates = updates.iter().map(AsRef::as_ref);
            raw::command_with(&rawdoc! { "update": collection }, "updates", updates, &tail)?
        };
        let database = self.deployment.database(self.namespace.database());
        let run = database.run_raw_command(command);
        Ok(match session {
            Some(session) => run.session(session).await?,
            None => run.await?,
        })
    }

    fn take_reply(
        &self,
        documents: &[(usize, &RawDocument)],
        statement: Statement,
        reply: &Document,
        outcome: &mut WriteOutcome,
    ) -> Result<()> {
        let errors: Vec<&Document> = reply.get_array("writeErrors").into_iter().flatten().filter_map(Bson::as_document).collect();
        let mut refused = 0;
        for error in &errors {
            let position = crate::connect::integer(error, "index").and_then(|index| usize::try_from(index).ok());
            let code = crate::connect::error_code(error);
            let (index, document) = position
                .and_then(|position| documents.get(position))
                .ok_or_else(|| Error::corrupt("the server refused a document that was not sent").with_context("code", code))?;
            let kind = classify_code(code);
            // Only a refusal of the document is an outcome; anything else (no primary, no privilege) fails every document alike.
            let about_documents =
                matches!(kind, ErrorKind::Rejected | ErrorKind::InvalidInput | ErrorKind::Internal | ErrorKind::Conflict);
            if !about_documents || SERVER_TROUBLE.contains(&code) {
                return Err(Error::new(kind, "the server stopped writing")
                    .with_context("code", code)
                    .with_context("namespace", &self.namespace));
            }
            let duplicate = match (error.get_document("keyPattern"), error.get_document("keyValue")) {
                (Ok(pattern), Ok(value)) => Some(Duplicate { pattern: pattern.clone(), value: value.clone() }),
                _ => None,
            };
            outcome.refused.push(Refused { index: *index, id: Key::of(document)?, code, kind, duplicate });
            refused += 1;
        }
        if let Ok(error) = reply.get_document("writeConcernError") {
            let code = crate::connect::error_code(error);
            return Err(Error::new(classify_code(code), "the write concern was not satisfied")
                .with_context("code", code)
                .with_context("namespace", &self.namespace));
        }
        let sent = if self.ordered && refused > 0 {
            outcome.refused.last().map_or(0, |last| last.index - documents.first().map_or(0, |(first, _)| *first) + 1)
        } else {
            documents.len()
        };
        let expected = (sent - refused) as u64;
        let written = crate::connect::integer(reply, "n").and_then(|n| u64::try_from(n).ok()).unwrap_or(0);
        // A reply that neither counts nor refuses a document would lose it in silence. A document to correct may have been
        // deleted by somebody in the meantime.
        if written != expected && statement != Statement::Correct {
            return Err(Error::internal("the server's count of written documents does not add up")
                .with_context("namespace", &self.namespace)
                .with_context("expected", expected)
                .with_context("counted", written));
        }
        outcome.written += written;
        outcome.op_time = OpTime::later_of(outcome.op_time, OpTime::in_field(reply, "opTime"))?;
        Ok(())
    }
}

/// How a document is put into a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Statement {
    /// An element of `insert`.
    Insert,
    /// An update that replaces or inserts.
    Replace,
    /// The same by a pipeline, which changes nothing of the document.
    ReplaceLiterally,
    /// A pipeline that gives a document that was just inserted the bytes that it should have. It must match: an upsert
    /// here would bring back what somebody else has deleted in the meantime.
    Correct,
}

fn update_statement(document: &RawDocument, statement: Statement) -> Result<RawDocumentBuf> {
    // `$eq` takes any value as a value, also a document whose fields look like operators.
    let mut update = rawdoc! { "q": { "_id": raw::id_of(document)?.alone_as("$eq")? } };
    if statement == Statement::Replace {
        update.append(cstr!("u"), document.to_owned());
    } else {
        let mut stages = RawArrayBuf::new();
        stages.push(rawdoc! { "$replaceWith": { "$literal": document.to_owned() } });
        update.append(cstr!("u"), stages);
    }
    update.append(cstr!("upsert"), statement != Statement::Correct);
    update.append(cstr!("multi"), false);
    Ok(update)
}

fn write_concern_document(concern: &WriteConcern) -> RawDocumentBuf {
    use mongodb::options::Acknowledgment;
    let mut document = RawDocumentBuf::new();
    match &concern.w {
        Some(Acknowledgment::Nodes(nodes)) => document.append(cstr!("w"), i64::from(*nodes)),
        Some(Acknowledgment::Custom(tag)) => document.append(cstr!("w"), tag.as_str()),
        _ => document.append(cstr!("w"), "majority"),
    }
    if let Some(journal) = concern.journal {
        document.append(cstr!("j"), journal);
    }
    if let Some(timeout) = concern.w_timeout {
        document.append(cstr!("wtimeout"), i64::try_from(timeout.as_millis()).unwrap_or(i64::MAX));
    }
    document
}

/// InternalError, UnknownError, IllegalOperation, OperationFailed: the server, not the document.
const SERVER_TROUBLE: [i32; 4] = [1, 8, 20, 96];
/// A command's body may have 16 MiB and 16 KiB.
const MAX_BYTES: usize = 16 << 20;
/// The array key, and for an update its query without the `_id`.
const OVERHEAD_A_DOCUMENT: usize = 96;
/// The server's `maxWriteBatchSize`.
const MAX_DOCUMENTS: usize = 100_000;
