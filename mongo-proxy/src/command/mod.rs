//! What is known of a command: what it asks for, of what, and in which circumstances.

pub(crate) mod kind;
pub(crate) mod touched;

use std::{borrow::Cow, time::Duration};

use bson::{RawBsonRef, RawDocument, raw::RawElement};

use self::kind::{Access, Kind, Known};
use crate::wire::Malformed;

/// A command, as far as it is looked at.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Command<'a> {
    /// Its first key: a server goes by that, and by no other.
    pub(crate) name: &'a str,
    pub(crate) database: &'a str,
    pub(crate) transaction: Transaction,
    /// Whether it has a number by which a server knows it again.
    pub(crate) is_numbered: bool,
    /// The longest that the client lets the server work on it, if it says so.
    pub(crate) max_time: Option<Duration>,
    known: Option<Known>,
    first: RawBsonRef<'a>,
    body: &'a RawDocument,
}

/// Where a command stands in a transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Transaction {
    Outside,
    Starts,
    GoesOn,
}

/// What a command may leave behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Leaves {
    Nothing,
    /// If its answer says so.
    Cursor,
    Transaction,
}

impl<'a> Command<'a> {
    /// Reads the body of a message that was checked. `database` for what does not say it itself, as legacy queries.
    pub(crate) fn read(body: &'a [u8], database: Option<&'a str>) -> Result<Self, Malformed> {
        let body = RawDocument::from_bytes(body).map_err(|_| Malformed::Bson)?;
        let (mut name, mut first) = (None, RawBsonRef::Null);
        let (mut says_database, mut starts, mut in_transaction, mut is_numbered, mut max_time) =
            (None, false, false, false, None);
        for field in body.iter_elements() {
            let field = field.map_err(|_| Malformed::Bson)?;
            let key = field.key().as_str();
            if name.is_none() {
                name = Some(key);
                // Text that is not UTF-8 names nothing that there is.
                first = field.value().unwrap_or(RawBsonRef::Null);
            }
            match key {
                // Of two a server might take the other one.
                "$db" => match (field.value(), says_database) {
                    (Ok(RawBsonRef::String(database)), None) => says_database = Some(database),
                    _ => return Err(Malformed::Bson),
                },
                "startTransaction" => starts |= is(&field, true),
                "autocommit" => in_transaction |= is(&field, false),
                "txnNumber" => is_numbered = true,
                "maxTimeMS" => max_time = field.value().ok().and_then(milliseconds),
                _ => {}
            }
        }
        let name = name.ok_or(Malformed::Bson)?;
        let database = says_database.or(database).ok_or(Malformed::Bson)?;
        if database.len() > LONGEST_DATABASE {
            return Err(Malformed::Bson);
        }
        let transaction = match (in_transaction, starts) {
            (false, _) => Transaction::Outside,
            (true, true) => Transaction::Starts,
            (true, false) => Transaction::GoesOn,
        };
        Ok(Self { name, database, transaction, is_numbered, max_time, known: Known::by(name), first, body })
    }

    fn kind(&self) -> Kind {
        self.known.map_or(Kind::Unknown, |known| known.kind)
    }

    /// Its name, without a copy of it if it is one that there is; of another as much as could mean anything.
    pub(crate) fn to_name(self) -> Cow<'static, str> {
        self.known.map_or_else(|| beginning(self.name).to_owned().into(), |known| known.name.into())
    }

    /// A number by which [`kind::name`] knows it again.
    pub(crate) fn number(&self) -> usize {
        self.known.map_or(kind::ANOTHER, |known| known.number)
    }

    /// What it is about, as `database.collection`, or the database.
    pub(crate) fn to_namespace(self) -> String {
        let collection = self.collection().map(beginning);
        let mut namespace = String::with_capacity(self.database.len() + collection.map_or(0, |collection| 1 + collection.len()));
        namespace.push_str(self.database);
        if let Some(collection) = collection {
            namespace.push('.');
            namespace.push_str(collection);
        }
        namespace
    }

    /// Whether it asks for the state of the server, by which a connection begins.
    pub(crate) fn is_hello(&self) -> bool {
        kind::is_hello(self.name)
    }

    pub(crate) fn body(&self) -> &'a RawDocument {
        self.body
    }

    /// The collection that it is about, where its first value is the name of one.
    pub(crate) fn collection(&self) -> Option<&'a str> {
        match (self.kind(), self.first) {
            (Kind::OnCollection(_), RawBsonRef::String(name)) => Some(name),
            (Kind::GetMore, _) => self.body.get_str("collection").ok(),
            _ => None,
        }
    }

    /// The name of the command that it is to explain.
    pub(crate) fn explained(&self) -> Option<&'a str> {
        let RawBsonRef::Document(inner) = self.first else { return None };
        let field = inner.iter_elements().next().filter(|_| self.kind() == Kind::Explain)?;
        Some(field.ok()?.key().as_str())
    }

    /// Whether it reads or writes data; `None` for what only begins, continues or ends something.
    pub(crate) fn access(&self) -> Option<Access> {
        match self.kind() {
            Kind::Connection => None,
            Kind::OnCollection(Access::Read) if touched::writes(self) => Some(Access::Write),
            Kind::OnCollection(access)
            | Kind::OnDatabase(access)
            | Kind::OnFullName(access)
            | Kind::OnServer(access)
            | Kind::OnEverything(access) => Some(access),
            Kind::Unknown => Some(Access::Write),
            Kind::GetMore | Kind::Explain => Some(Access::Read),
        }
    }

    /// Whether it must be let through whatever the rules say: what begins a connection, and what continues or ends something that was let in. A
    /// server exempts the same, as it sets free what others wait for.
    pub(crate) fn is_always_let_through(&self) -> bool {
        matches!(self.kind(), Kind::Connection | Kind::GetMore)
    }

    /// Whether it goes on with something that was begun before it.
    pub(crate) fn continues(&self) -> bool {
        self.is_always_let_through() || self.transaction == Transaction::GoesOn
    }

    /// Whether it may leave something behind that is gone on with.
    pub(crate) fn may_leave(&self) -> Leaves {
        match self.name {
            "commitTransaction" | "abortTransaction" => Leaves::Nothing,
            _ if self.transaction != Transaction::Outside => Leaves::Transaction,
            "find" | "aggregate" | "listCollections" | "listIndexes" | "bulkWrite" | "getMore" => Leaves::Cursor,
            _ => Leaves::Nothing,
        }
    }
}

fn is(field: &RawElement<'_>, value: bool) -> bool {
    field.value().ok().and_then(RawBsonRef::as_bool) == Some(value)
}

fn milliseconds(value: RawBsonRef<'_>) -> Option<Duration> {
    let number = match value {
        RawBsonRef::Int32(number) => f64::from(number),
        RawBsonRef::Int64(number) => number as f64,
        RawBsonRef::Double(number) => number,
        _ => return None,
    };
    // Nothing is no limit.
    Duration::try_from_secs_f64(number / 1000.0).ok().filter(|time| !time.is_zero())
}

/// As much of a name as is kept of it: none that means anything is longer.
fn beginning(name: &str) -> &str {
    let mut end = name.len().min(LONGEST_NAMESPACE);
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    &name[..end]
}

/// The longest name of a database that there is.
const LONGEST_DATABASE: usize = 63;
/// Of a database, a dot and a collection.
const LONGEST_NAMESPACE: usize = 255;

#[cfg(test)]
mod tests;
