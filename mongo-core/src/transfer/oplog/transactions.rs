//! Putting transactions together: their operations take effect when they commit, and not at all when they abort.
//!
//! An unprepared transaction is one `applyOps` entry, or several of which all but the last say `partialTxn`. A prepared one ends in an
//! entry that says `prepare`, and takes effect with a later `commitTransaction`, at the time that this names, or not at all.

use std::{
    collections::HashMap,
    fmt,
    fs::File,
    io::{Read as _, Seek as _, SeekFrom, Write as _},
};

use mongodb::bson::{RawDocument, Timestamp};

use super::entry::{Action, Command, Entry, Operation, TransactionId};
use crate::error::{Error, Result};

/// Puts transactions together from the entries of an oplog, in order.
///
/// What is put together is in memory up to a bound, behind that in unnamed temporary files.
#[derive(Debug)]
pub struct Transactions {
    open: HashMap<(Vec<u8>, i64), Open>,
    in_memory: usize,
    memory_bytes: usize,
}

#[derive(Debug)]
struct Open {
    operations: Spool,
    since: Timestamp,
    is_prepared: bool,
    /// Whether its first entry is known.
    is_whole: bool,
}

/// What an entry brings about.
#[derive(Debug)]
#[non_exhaustive]
pub enum Effect<'a> {
    /// Nothing, or nothing yet.
    None,
    /// One change to a document.
    One(Operation<'a>),
    /// Several operations that take effect at once.
    Many(Group),
    /// A change of definitions.
    Command(Command<'a>),
}

/// Operations that take effect at the same time.
#[derive(Debug)]
#[non_exhaustive]
pub struct Group {
    /// When they take effect: a prepared transaction names a time that is not later than its entry.
    pub at: Timestamp,
    /// Whether all of them are known; not, if the reading began in the middle of a transaction.
    pub is_whole: bool,
    operations: Spool,
}

impl Transactions {
    /// None is open. Up to `memory_bytes` of operations are kept in memory.
    pub fn new(memory_bytes: usize) -> Self {
        Self { open: HashMap::new(), in_memory: 0, memory_bytes }
    }

    /// Where the oldest transaction begins that is open: whoever begins to read there has all of it.
    pub fn oldest_open(&self) -> Option<Timestamp> {
        self.open.values().map(|open| open.since).min()
    }

    /// Whether a transaction is open that may commit at a time before its entry.
    pub fn has_prepared(&self) -> bool {
        self.open.values().any(|open| open.is_prepared)
    }

    /// Takes the next entry.
    ///
    /// # Errors
    /// `CorruptData` for an entry that is malformed, `Internal` when a temporary file cannot be written.
    pub fn take<'a>(&mut self, entry: &Entry<'a>) -> Result<Effect<'a>> {
        let command = match entry.action {
            None => return Ok(Effect::None),
            Some(Action::Operation(operation)) => return Ok(Effect::One(operation)),
            Some(Action::Command(command)) => command,
        };
        match (command.name, entry.transaction()) {
            ("applyOps", Some(transaction)) => self.take_part(entry, transaction, &command),
            ("applyOps", None) => {
                let mut operations = Spool::default();
                for carried in command.carried() {
                    operations.push(carried?);
                }
                Ok(Effect::Many(Group { at: entry.position, is_whole: true, operations }))
            }
            ("commitTransaction", Some(transaction)) => {
                let at = command.field(b"commitTimestamp").and_then(|field| field.as_timestamp()).unwrap_or(entry.position);
                Ok(Effect::Many(match self.remove(transaction) {
                    Some(open) => Group { at, is_whole: open.is_whole, operations: open.operations },
                    None => Group { at, is_whole: false, operations: Spool::default() },
                }))
            }
            ("abortTransaction", Some(transaction)) => {
                self.remove(transaction);
                Ok(Effect::None)
            }
            _ => Ok(Effect::Command(command)),
        }
    }

    fn take_part<'a>(&mut self, entry: &Entry<'_>, transaction: TransactionId<'_>, command: &Command<'_>) -> Result<Effect<'a>> {
        let at = entry.position;
        let key = (transaction.session.to_vec(), transaction.number);
        let is_whole = entry.is_first();
        let new = || Open { operations: Spool::default(), since: at, is_prepared: false, is_whole };
        let open = self.open.entry(key).or_insert_with(new);
        let before = open.operations.in_memory();
        for carried in command.carried() {
            open.operations.push(carried?);
        }
        self.in_memory += open.operations.in_memory() - before;
        open.is_prepared = command.flag(b"prepare");
        if !open.is_prepared && !command.flag(b"partialTxn") {
            let open = self.remove(transaction).ok_or_else(|| Error::internal("a transaction got lost"))?;
            return Ok(Effect::Many(Group { at, is_whole: open.is_whole, operations: open.operations }));
        }
        while self.in_memory > self.memory_bytes
            && let Some(largest) = self.open.values_mut().max_by_key(|open| open.operations.in_memory())
        {
            self.in_memory -= largest.operations.in_memory();
            largest.operations.spill()?;
        }
        Ok(Effect::None)
    }

    fn remove(&mut self, transaction: TransactionId<'_>) -> Option<Open> {
        let open = self.open.remove(&(transaction.session.to_vec(), transaction.number))?;
        self.in_memory -= open.operations.in_memory();
        Some(open)
    }
}

impl Group {
    /// The next operations, a few MiB at a time; none at the end.
    ///
    /// # Errors
    /// `Internal` when a temporary file cannot be read.
    pub fn next_carried(&mut self) -> Result<Option<Carried>> {
        self.operations.next()
    }
}

/// Some operations of a transaction.
pub struct Carried(Vec<u8>);

impl Carried {
    /// Each of them. Those within another `applyOps` stand in its place.
    ///
    /// # Errors
    /// As [`Action::parse`].
    pub fn actions(&self) -> Result<Vec<Action<'_>>> {
        let mut actions = Vec::new();
        let mut rest = self.0.as_slice();
        while let Some(length) = rest.first_chunk::<4>().map(|bytes| i32::from_le_bytes(*bytes)) {
            let length = usize::try_from(length).unwrap_or(usize::MAX);
            let (document, behind) =
                rest.split_at_checked(length).ok_or_else(|| Error::corrupt("a transaction of the oplog is malformed"))?;
            collect(RawDocument::from_bytes(document)?, 0, &mut actions)?;
            rest = behind;
        }
        Ok(actions)
    }
}

impl fmt::Debug for Carried {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // What they hold is data.
        f.write_str("Carried")
    }
}

fn collect<'a>(document: &'a RawDocument, depth: u32, actions: &mut Vec<Action<'a>>) -> Result<()> {
    if depth > DEEPEST {
        return Err(Error::corrupt("operations of the oplog are nested deeper than any server allows"));
    }
    match Action::parse(document)? {
        Some(Action::Command(command)) if command.name == "applyOps" => {
            for carried in command.carried() {
                collect(carried?, depth + 1, actions)?;
            }
        }
        action => actions.extend(action),
    }
    Ok(())
}

/// The server's own limit.
const DEEPEST: u32 = 10;

/// Documents in order, in memory or in a file.
#[derive(Default)]
struct Spool {
    buffer: Vec<u8>,
    /// What came before the buffer, and how much of it was read.
    file: Option<(File, u64, u64)>,
}

impl fmt::Debug for Spool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Spool").field("in_memory", &self.buffer.len()).field("in_file", &self.file.is_some()).finish()
    }
}

impl Spool {
    fn push(&mut self, document: &RawDocument) {
        self.buffer.extend_from_slice(document.as_bytes());
    }

    fn in_memory(&self) -> usize {
        self.buffer.len()
    }

    fn spill(&mut self) -> Result<()> {
        let (file, length, _) = match &mut self.file {
            Some(file) => file,
            none => none.insert((tempfile::tempfile().map_err(spilled)?, 0, 0)),
        };
        file.write_all(&self.buffer).map_err(spilled)?;
        *length += self.buffer.len() as u64;
        self.buffer = Vec::new();
        Ok(())
    }

    fn next(&mut self) -> Result<Option<Carried>> {
        if let Some((file, length, read)) = &mut self.file
            && *read < *length
        {
            let mut bytes = Vec::new();
            file.seek(SeekFrom::Start(*read)).map_err(spilled)?;
            file.take(CHUNK.min(*length - *read)).read_to_end(&mut bytes).map_err(spilled)?;
            let whole = whole_documents(&bytes);
            if whole == 0 {
                return self.next_large();
            }
            bytes.truncate(whole);
            *read += whole as u64;
            return Ok(Some(Carried(bytes)));
        }
        let bytes = std::mem::take(&mut self.buffer);
        Ok((!bytes.is_empty()).then_some(Carried(bytes)))
    }

    /// A document that is larger than a chunk.
    fn next_large(&mut self) -> Result<Option<Carried>> {
        let Some((file, length, read)) = &mut self.file else { return Ok(None) };
        let mut head = [0; 4];
        file.seek(SeekFrom::Start(*read)).map_err(spilled)?;
        file.read_exact(&mut head).map_err(spilled)?;
        let size = u64::try_from(i32::from_le_bytes(head)).ok().filter(|size| *size >= 5 && *read + size <= *length);
        let size = size.ok_or_else(|| Error::corrupt("a transaction of the oplog is malformed"))?;
        let mut bytes = Vec::new();
        file.seek(SeekFrom::Start(*read)).map_err(spilled)?;
        file.take(size).read_to_end(&mut bytes).map_err(spilled)?;
        *read += size;
        Ok(Some(Carried(bytes)))
    }
}

/// How many bytes at the front are whole documents.
fn whole_documents(bytes: &[u8]) -> usize {
    let mut whole = 0;
    while let Some(length) = bytes.get(whole..).and_then(|rest| rest.first_chunk::<4>()) {
        let length = usize::try_from(i32::from_le_bytes(*length)).unwrap_or(usize::MAX);
        match whole.checked_add(length) {
            Some(end) if length >= 5 && end <= bytes.len() => whole = end,
            _ => break,
        }
    }
    whole
}

fn spilled(error: std::io::Error) -> Error {
    Error::internal("a transaction that is too large for memory cannot be kept in a temporary file: is there room?")
        .with_source(error)
}

const CHUNK: u64 = 4 << 20;

#[cfg(test)]
mod tests {
    use mongodb::bson::{Binary, Bson, Document, RawDocumentBuf, doc, spec::BinarySubtype};

    use super::*;

    fn at(time: u32) -> Timestamp {
        Timestamp { time, increment: 1 }
    }

    fn entry(time: u32, session: u8, number: i64, object: Document) -> RawDocumentBuf {
        let id = Binary { subtype: BinarySubtype::Uuid, bytes: vec![session; 16] };
        let entry =
            doc! { "op": "c", "ns": "admin.$cmd", "o": object, "lsid": { "id": id }, "txnNumber": number, "ts": at(time) };
        RawDocumentBuf::try_from(&entry).unwrap()
    }

    fn insert(id: i32) -> Bson {
        doc! { "op": "i", "ns": "a.b", "o": { "_id": id } }.into()
    }

    fn ids(effect: Effect<'_>) -> Option<(Timestamp, Vec<i32>)> {
        let Effect::Many(mut group) = effect else { return None };
        let mut ids = Vec::new();
        while let Some(carried) = group.next_carried().unwrap() {
            for action in carried.actions().unwrap() {
                let Action::Operation(operation) = action else { panic!("no operation") };
                ids.push(operation.object.get_i32("_id").unwrap());
            }
        }
        Some((group.at, ids))
    }

    fn run(memory_bytes: usize, entries: &[RawDocumentBuf]) -> Vec<(Timestamp, Vec<i32>)> {
        let mut transactions = Transactions::new(memory_bytes);
        let effects = entries.iter().filter_map(|entry| ids(transactions.take(&Entry::parse(entry).unwrap()).unwrap()));
        effects.collect()
    }

    #[test]
    fn a_transaction_takes_effect_with_its_last_entry() {
        let entries = [
            entry(1, 1, 7, doc! { "applyOps": [insert(1)], "partialTxn": true }),
            entry(2, 2, 7, doc! { "applyOps": [insert(10)] }),
            entry(3, 1, 7, doc! { "applyOps": [insert(2), insert(3)] }),
        ];
        for memory_bytes in [0, 1 << 20] {
            assert_eq!(run(memory_bytes, &entries), [(at(2), vec![10]), (at(3), vec![1, 2, 3])]);
        }
    }

    #[test]
    fn a_prepared_transaction_takes_effect_at_the_time_that_its_commit_names() {
        let entries = [
            entry(1, 1, 7, doc! { "applyOps": [insert(1)], "prepare": true }),
            entry(2, 2, 7, doc! { "applyOps": [insert(2)], "prepare": true }),
            entry(3, 2, 7, doc! { "abortTransaction": 1 }),
            entry(5, 1, 7, doc! { "commitTransaction": 1, "commitTimestamp": at(4) }),
        ];
        assert_eq!(run(0, &entries), [(at(4), vec![1])]);
    }

    #[test]
    fn a_transaction_whose_beginning_is_not_known_says_so() {
        let mut begun = entry(2, 1, 7, doc! { "applyOps": [insert(1)] });
        let whole = |entry: &RawDocumentBuf| match Transactions::new(0).take(&Entry::parse(entry).unwrap()).unwrap() {
            Effect::Many(group) => group.is_whole,
            other => panic!("{other:?}"),
        };
        assert!(whole(&begun));
        begun.append(mongodb::bson::cstr!("prevOpTime"), mongodb::bson::rawdoc! { "ts": at(1), "t": 1_i64 });
        assert!(!whole(&begun));
        assert!(!whole(&entry(3, 1, 7, doc! { "commitTransaction": 1, "commitTimestamp": at(2) })));
    }

    #[test]
    fn the_oldest_open_transaction_is_where_reading_must_begin() {
        let mut transactions = Transactions::new(1 << 20);
        let first = entry(1, 1, 7, doc! { "applyOps": [insert(1)], "prepare": true });
        let second = entry(2, 2, 7, doc! { "applyOps": [insert(2)], "partialTxn": true });
        transactions.take(&Entry::parse(&first).unwrap()).unwrap();
        transactions.take(&Entry::parse(&second).unwrap()).unwrap();
        assert_eq!((transactions.oldest_open(), transactions.has_prepared()), (Some(at(1)), true));
        let abort = entry(3, 1, 7, doc! { "abortTransaction": 1 });
        transactions.take(&Entry::parse(&abort).unwrap()).unwrap();
        assert_eq!((transactions.oldest_open(), transactions.has_prepared()), (Some(at(2)), false));
    }

    #[test]
    fn a_large_transaction_comes_back_from_its_file_in_order() {
        let large = |id: i32| doc! { "op": "i", "ns": "a.b", "o": { "_id": id, "x": "y".repeat(3 << 20) } };
        let mut entries: Vec<RawDocumentBuf> =
            (0..4).map(|id| entry(1, 1, 1, doc! { "applyOps": [large(id)], "partialTxn": true })).collect();
        entries.push(entry(
            1,
            1,
            1,
            doc! { "applyOps": [{ "op": "i", "ns": "a.b", "o": { "_id": 4, "x": "y".repeat(9 << 20) } }], "partialTxn": true },
        ));
        entries.push(entry(9, 1, 1, doc! { "applyOps": [insert(5)] }));
        assert_eq!(run(1 << 20, &entries), [(at(9), vec![0, 1, 2, 3, 4, 5])]);
    }

    #[test]
    fn operations_in_a_nested_apply_ops_stand_in_its_place() {
        let nested = doc! { "op": "c", "ns": "admin.$cmd", "o": { "applyOps": [insert(2), insert(3)] } };
        let entries = [entry(1, 1, 7, doc! { "applyOps": [insert(1), nested, insert(4)] })];
        assert_eq!(run(0, &entries), [(at(1), vec![1, 2, 3, 4])]);
    }
}
