//! One entry of the oplog, taken apart without being decoded.

use mongodb::bson::{RawDocument, Timestamp};

use super::super::raw::{self, Element};
use crate::error::{Error, ErrorKind, Result};

/// An entry of `local.oplog.rs`.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Entry<'a> {
    /// Where it stands.
    pub position: Timestamp,
    /// The term of the primary that wrote it.
    pub term: i64,
    /// What it does.
    pub action: Option<Action<'a>>,
    transaction: Option<TransactionId<'a>>,
    multi_op_type: i64,
    /// Where the entry before it of the same transaction stands; zero if it is the first.
    previous: Option<Timestamp>,
    document: &'a RawDocument,
}

/// What an entry, or one operation of a transaction, does.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum Action<'a> {
    /// Changes one document.
    Operation(Operation<'a>),
    /// Changes a definition, or carries other operations.
    Command(Command<'a>),
}

/// A change to one document.
#[derive(Clone, Copy)]
#[non_exhaustive]
pub struct Operation<'a> {
    /// What is done to it.
    pub kind: OperationKind,
    /// The namespace, as `database.collection`, at the time of the operation.
    pub namespace: &'a str,
    /// The UUID of the collection.
    pub uuid: Option<[u8; 16]>,
    /// The document, or the update, or for a delete what identifies the document.
    pub object: &'a RawDocument,
    /// For an update what identifies the document: its `_id`, and its shard key if it has one.
    pub query: Option<&'a RawDocument>,
}

impl std::fmt::Debug for Operation<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // What it holds is data.
        f.debug_struct("Operation").field("kind", &self.kind).field("namespace", &self.namespace).finish_non_exhaustive()
    }
}

/// What is done to a document.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum OperationKind {
    /// It is there now.
    Insert,
    /// It is another now.
    Update,
    /// It is gone.
    Delete,
}

/// A command in the oplog.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Command<'a> {
    /// The database.
    pub database: &'a str,
    /// The UUID of the collection that it is about.
    pub uuid: Option<[u8; 16]>,
    /// Its name, as `create`.
    pub name: &'a str,
    /// The command.
    pub object: &'a RawDocument,
    /// What the server noted beside it, as the options before a `collMod`.
    pub before: Option<&'a RawDocument>,
}

/// Which transaction an entry belongs to: the session, as its bytes, and the number in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct TransactionId<'a> {
    pub(super) session: &'a [u8],
    pub(super) number: i64,
}

impl<'a> Entry<'a> {
    /// Takes an entry apart.
    ///
    /// # Errors
    /// `CorruptData` for what is no entry, `Unsupported` for an operation of a kind that is not known here.
    pub fn parse(document: &'a RawDocument) -> Result<Self> {
        let (mut position, mut term, mut number, mut session, mut multi_op_type) = (None, -1, None, None, 0);
        let mut previous = None;
        for element in raw::elements(document) {
            let element = element?;
            match element.name {
                b"ts" => position = element.as_timestamp(),
                b"t" => term = element.as_integer().unwrap_or(-1),
                b"lsid" => session = Some(element.value),
                b"txnNumber" => number = element.as_integer(),
                b"prevOpTime" => previous = element.as_document().and_then(|previous| previous.get_timestamp("ts").ok()),
                b"multiOpType" => multi_op_type = element.as_integer().unwrap_or(0),
                _ => {}
            }
        }
        let position = position.ok_or_else(|| malformed("an entry of the oplog has no timestamp"))?;
        let transaction = session.zip(number).map(|(session, number)| TransactionId { session, number });
        Ok(Self { position, term, action: Action::parse(document)?, transaction, multi_op_type, previous, document })
    }

    /// The entry as the server has it.
    pub fn document(&self) -> &'a RawDocument {
        self.document
    }

    /// Whether it is the first of its transaction.
    pub(super) fn is_first(&self) -> bool {
        self.previous.is_none_or(|previous| previous == Timestamp { time: 0, increment: 0 })
    }

    /// The transaction of which this is a part, or whose end.
    pub(super) fn transaction(&self) -> Option<TransactionId<'a>> {
        // A retryable insert of several documents has a session and a number too.
        self.transaction.filter(|_| self.multi_op_type != RETRYABLE_INSERT)
    }
}

impl<'a> Action<'a> {
    /// Takes an operation apart: an entry, or one of those that an entry carries. None if it changes nothing that a copy has.
    ///
    /// # Errors
    /// As [`Entry::parse`].
    pub fn parse(document: &'a RawDocument) -> Result<Option<Self>> {
        let (mut op, mut namespace, mut uuid, mut object, mut second) = (None, None, None, None, None);
        for element in raw::elements(document) {
            let element = element?;
            match element.name {
                b"op" => op = element.as_str(),
                b"ns" => namespace = element.as_str(),
                b"ui" => uuid = element.as_uuid(),
                b"o" => object = Some(element),
                b"o2" => second = element.as_document(),
                _ => {}
            }
        }
        let op = op.ok_or_else(|| malformed("an entry of the oplog does not say what it does"))?;
        let kind = match op {
            "i" => OperationKind::Insert,
            "u" => OperationKind::Update,
            "d" => OperationKind::Delete,
            "c" => {
                let namespace = namespace.ok_or_else(|| malformed("a command of the oplog has no namespace"))?;
                let object = object.and_then(|object| object.as_document());
                let object = object.ok_or_else(|| malformed("a command of the oplog is no document"))?;
                return Command::of(namespace, uuid, object, second).map(|command| Some(Self::Command(command)));
            }
            // Notes, and what members tell each other about record ids.
            "n" | "ci" | "cd" | "cu" | "km" => return Ok(None),
            _ => {
                return Err(Error::new(ErrorKind::Unsupported, "the oplog holds operations of a kind that is not known here")
                    .with_context("op", op.escape_debug()));
            }
        };
        let namespace = namespace.ok_or_else(|| malformed("an operation of the oplog has no namespace"))?;
        let object = object.and_then(|object| object.as_document());
        let object = object.ok_or_else(|| malformed("an operation of the oplog has no document"))?;
        Ok(Some(Self::Operation(Operation { kind, namespace, uuid, object, query: second })))
    }
}

impl<'a> Operation<'a> {
    /// The bytes of the `_id` element of the document that is changed: type, name and value.
    ///
    /// # Errors
    /// `CorruptData` when there is none.
    pub fn id(&self) -> Result<Vec<u8>> {
        let id = self.id_element()?;
        Ok([&[id.kind], b"_id\0".as_slice(), id.value].concat())
    }

    pub(in super::super) fn id_element(&self) -> Result<Element<'a>> {
        let holder = match self.kind {
            OperationKind::Update => self.query.ok_or_else(|| malformed("an update of the oplog does not say of what"))?,
            _ => self.object,
        };
        raw::id_of(holder)
    }
}

impl<'a> Command<'a> {
    fn of(namespace: &'a str, uuid: Option<[u8; 16]>, object: &'a RawDocument, before: Option<&'a RawDocument>) -> Result<Self> {
        let first = raw::elements(object).next().transpose()?;
        let name = first.and_then(|first| std::str::from_utf8(first.name).ok());
        let name = name.ok_or_else(|| malformed("a command of the oplog has no name"))?;
        let database = namespace.split_once('.').map_or(namespace, |(database, _)| database);
        Ok(Self { database, uuid, name, object, before })
    }

    /// The collection that the command names, as `database.collection`.
    ///
    /// # Errors
    /// `CorruptData` when it names none.
    pub fn namespace(&self) -> Result<String> {
        let first = raw::elements(self.object).next().transpose()?;
        let collection = first.and_then(|first| first.as_str());
        let collection = collection.ok_or_else(|| malformed("a command of the oplog names no collection"))?;
        Ok(format!("{}.{collection}", self.database))
    }

    /// The operations that an `applyOps` carries.
    pub fn carried(&self) -> impl Iterator<Item = Result<&'a RawDocument>> + use<'a> {
        let list = raw::elements(self.object).find_map(|element| element.ok().filter(|element| element.name == b"applyOps"));
        let elements = list.and_then(|list| list.as_array()).map(raw::elements);
        elements.into_iter().flatten().map(|element| {
            element?.as_document().ok_or_else(|| malformed("a transaction in the oplog carries something that is no operation"))
        })
    }

    pub(super) fn flag(&self, name: &[u8]) -> bool {
        self.field(name).is_some_and(|element| element.as_bool() == Some(true))
    }

    pub(super) fn field(&self, name: &[u8]) -> Option<Element<'a>> {
        raw::elements(self.object).find_map(|element| element.ok().filter(|element| element.name == name))
    }
}

fn malformed(what: &'static str) -> Error {
    Error::corrupt(what)
}

/// The `multiOpType` of an `applyOps` that is a retryable insert of several documents and no transaction.
const RETRYABLE_INSERT: i64 = 1;

#[cfg(test)]
mod tests {
    use mongodb::bson::{Binary, RawDocumentBuf, rawdoc, spec::BinarySubtype};
    use proptest::prelude::*;

    use super::*;

    fn uuid() -> Binary {
        Binary { subtype: BinarySubtype::Uuid, bytes: vec![7; 16] }
    }

    fn at(time: u32) -> Timestamp {
        Timestamp { time, increment: 1 }
    }

    #[test]
    fn operations_say_what_they_change() {
        let update = rawdoc! { "op": "u", "ns": "shop.orders", "ui": uuid(), "o": { "$v": 2, "diff": { "u": { "a": 1 } } },
        "o2": { "_id": 5 }, "ts": at(3), "t": 2_i64, "v": 2_i64 };
        let entry = Entry::parse(&update).unwrap();
        assert_eq!((entry.position, entry.term), (at(3), 2));
        let Some(Action::Operation(operation)) = entry.action else { panic!("no operation") };
        assert_eq!((operation.kind, operation.namespace), (OperationKind::Update, "shop.orders"));
        assert_eq!(operation.uuid, Some([7; 16]));
        assert_eq!(operation.id().unwrap(), [&[0x10][..], b"_id\0", &5_i32.to_le_bytes()].concat());
    }

    #[test]
    fn notes_and_record_ids_change_nothing() {
        for op in ["n", "ci", "cd", "cu", "km"] {
            let note = rawdoc! { "op": op, "ns": "", "o": { "msg": "x" }, "ts": at(1) };
            assert!(Entry::parse(&note).unwrap().action.is_none());
        }
        let unknown = rawdoc! { "op": "zz", "ns": "", "o": {}, "ts": at(1) };
        assert_eq!(Entry::parse(&unknown).unwrap_err().kind(), ErrorKind::Unsupported);
    }

    #[test]
    fn a_retryable_insert_of_several_is_no_transaction() {
        let entry = |multi: i32| -> RawDocumentBuf {
            rawdoc! { "op": "c", "ns": "admin.$cmd", "o": { "applyOps": [] }, "lsid": { "id": uuid() }, "txnNumber": 3_i64,
            "multiOpType": multi, "ts": at(1) }
        };
        assert!(Entry::parse(&entry(1)).unwrap().transaction().is_none());
        assert_eq!(Entry::parse(&entry(0)).unwrap().transaction().unwrap().number, 3);
    }

    proptest! {
        #[test]
        fn no_changed_byte_of_an_entry_is_a_panic(at_byte in any::<prop::sample::Index>(), flip in 1..=255_u8) {
            let inner = rawdoc! { "op": "i", "ns": "a.b", "o": { "_id": 1 }, "ui": uuid() };
            let whole = rawdoc! { "op": "c", "ns": "admin.$cmd", "o": { "applyOps": [inner], "prepare": true }, "ts": at(1) };
            let mut bytes = whole.into_bytes();
            let position = at_byte.index(bytes.len() - 8) + 4;
            bytes[position] ^= flip;
            if let Ok(document) = RawDocument::from_bytes(&bytes)
                && let Ok(entry) = Entry::parse(document)
                && let Some(Action::Command(command)) = entry.action
            {
                for carried in command.carried().flatten() {
                    let _ = Action::parse(carried);
                }
            }
        }
    }
}
