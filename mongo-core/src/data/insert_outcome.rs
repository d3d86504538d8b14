//! What the server's answer to a batch says about its documents.

use mongodb::{
    error::{Error as DriverError, ErrorKind as DriverKind, InsertManyError, NO_WRITES_PERFORMED, WriteConcernError},
    results::InsertManyResult,
};

use super::insert::InsertOrder;
use crate::error::{Error, ErrorKind, classify_code};

/// Why one document was not inserted. It holds nothing of the document itself.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct DocumentFailure {
    /// Position of the document in the input, from 0.
    pub index: u64,
    /// What can be done about it: [`ErrorKind::Rejected`] means the document is at fault, [`ErrorKind::Unavailable`]
    /// that the same document may be inserted later.
    pub kind: ErrorKind,
    /// The server's error code; `None` when the document was refused before it was sent.
    pub code: Option<i32>,
    /// The name of the code, where it is known.
    pub code_name: Option<String>,
    /// One line for people, without values of the document.
    pub message: String,
}

/// What one answer says about one batch. The indexes of `failures` count from the start of the batch.
#[derive(Default)]
pub(super) struct Outcome {
    pub(super) inserted: u64,
    pub(super) unknown: u64,
    pub(super) failures: Vec<DocumentFailure>,
    pub(super) error: Option<Error>,
}

/// Reads an answer.
pub(super) fn judge(result: mongodb::error::Result<InsertManyResult>, documents: usize, order: InsertOrder) -> Outcome {
    let documents = documents as u64;
    let Err(error) = result else {
        return Outcome { inserted: documents, ..Outcome::default() };
    };
    let DriverKind::InsertMany(partial) = &*error.kind else {
        let unknown = if surely_wrote_nothing(&error) { 0 } else { documents };
        return Outcome { unknown, error: Some(error.into()), ..Outcome::default() };
    };
    let (inserted, failures) = judge_partial(partial, documents, order);
    let error = partial.write_concern_error.clone().map(|concern| unsatisfied(&concern, error));
    Outcome { inserted, failures, error, unknown: 0 }
}

/// How many of a batch are in, by the failures that the server names.
fn judge_partial(partial: &InsertManyError, documents: u64, order: InsertOrder) -> (u64, Vec<DocumentFailure>) {
    let failures: Vec<DocumentFailure> = partial
        .write_errors
        .iter()
        .flatten()
        .map(|error| DocumentFailure {
            index: error.index as u64,
            kind: kind_of(error.code),
            code: Some(error.code),
            code_name: error.code_name.clone().filter(|name| !name.is_empty()).or_else(|| name_of(error.code)),
            message: safe_message(error.code, &error.message),
        })
        .collect();
    let inserted = match order {
        InsertOrder::Unordered => documents.saturating_sub(failures.len() as u64),
        // A batch fits one message, so the driver does not split it, and the first failure is the only one.
        InsertOrder::Ordered => failures.first().map_or(documents, |first| first.index.min(documents)),
    };
    (inserted, failures)
}

/// The documents are on the primary, but not known to be where the caller asked for.
fn unsatisfied(concern: &WriteConcernError, error: DriverError) -> Error {
    let kind = match concern.code {
        // UnknownReplWriteConcern, UnsatisfiableWriteConcern: no waiting will help.
        79 | 100 => ErrorKind::InvalidInput,
        code => classify_code(code),
    };
    Error::new(kind, "documents were written, but the write concern was not satisfied").with_source(Error::from(error))
}

/// Whether the failed command cannot have inserted anything. In doubt it can.
fn surely_wrote_nothing(error: &DriverError) -> bool {
    if error.contains_label(NO_WRITES_PERFORMED) {
        return true;
    }
    match &*error.kind {
        DriverKind::ServerSelection { .. }
        | DriverKind::InvalidArgument { .. }
        | DriverKind::Authentication { .. }
        | DriverKind::InvalidTlsConfig { .. }
        | DriverKind::DnsResolve { .. } => true,
        DriverKind::Command(command) => matches!(
            classify_code(command.code),
            ErrorKind::Unauthorized | ErrorKind::Unsupported | ErrorKind::InvalidInput | ErrorKind::NotFound
        ),
        _ => false,
    }
}

fn kind_of(code: i32) -> ErrorKind {
    match classify_code(code) {
        // A code of its own for one document is about that document: wrong names, wrong types, text and geo indexes
        // that cannot take the value, capped collections.
        ErrorKind::Internal | ErrorKind::InvalidInput | ErrorKind::Unsupported => ErrorKind::Rejected,
        kind => kind,
    }
}

/// Servers leave `codeName` out of write errors.
fn name_of(code: i32) -> Option<String> {
    let name = match code {
        2 => "BadValue",
        13 => "Unauthorized",
        52 => "DollarPrefixedFieldName",
        53 => "InvalidIdField",
        57 => "DottedFieldName",
        112 => "WriteConflict",
        121 => "DocumentValidationFailure",
        10107 => "NotWritablePrimary",
        10334 => "BSONObjectTooLarge",
        11000 => "DuplicateKey",
        11600 => "InterruptedAtShutdown",
        11602 => "InterruptedDueToReplStateChange",
        _ => return None,
    };
    Some(name.to_owned())
}

/// The server's text quotes keys and values; what is kept of it is the name of an index.
fn safe_message(code: i32, message: &str) -> String {
    match code {
        11000 | 11001 => match message.split_once(" index: ").and_then(|(_, rest)| rest.split_once(" dup key")) {
            Some((index, _)) => format!("another document has the same key in the unique index {}", index.trim()),
            None => "another document has the same key in a unique index".to_owned(),
        },
        121 => "the document does not pass the collection's validator".to_owned(),
        10334 => "the document is larger than 16 MiB".to_owned(),
        52 | 57 => "a field name is not allowed in a stored document".to_owned(),
        53 => "the _id is of a type that an _id cannot have".to_owned(),
        _ => format!("the server refused the document with code {code}"),
    }
}

#[cfg(test)]
mod tests {
    use mongodb::bson::{self, Document, doc};

    use super::*;

    fn partial(reply: Document) -> InsertManyError {
        bson::deserialize_from_document(reply).unwrap()
    }

    fn duplicate(index: i32) -> Document {
        doc! { "index": index, "code": 11000, "errmsg": "E11000 duplicate key error collection: shop.users index: email_1 dup key: { email: \"a@b.example\" }" }
    }

    #[test]
    fn an_ordered_batch_is_in_up_to_the_refused_document() {
        let (inserted, failures) = judge_partial(&partial(doc! { "writeErrors": [duplicate(3)] }), 10, InsertOrder::Ordered);
        assert_eq!((inserted, failures.len(), failures[0].index), (3, 1, 3));
    }

    #[test]
    fn an_unordered_batch_is_in_but_for_the_refused_documents() {
        let (inserted, failures) =
            judge_partial(&partial(doc! { "writeErrors": [duplicate(0), duplicate(9)] }), 10, InsertOrder::Unordered);
        assert_eq!((inserted, failures.len()), (8, 2));
    }

    #[test]
    fn failures_name_the_index_and_quote_no_value() {
        let (_, failures) = judge_partial(&partial(doc! { "writeErrors": [duplicate(0)] }), 1, InsertOrder::Ordered);
        assert_eq!(failures[0].code_name.as_deref(), Some("DuplicateKey"));
        assert_eq!(failures[0].kind, ErrorKind::Rejected);
        assert_eq!(failures[0].message, "another document has the same key in the unique index email_1");
    }

    #[test]
    fn an_unsatisfied_write_concern_is_an_error_although_documents_are_in() {
        let reply = doc! { "writeConcernError": { "code": 64, "codeName": "WriteConcernFailed", "errmsg": "waiting for replication timed out" } };
        let error = DriverError::from(DriverKind::InsertMany(partial(reply)));
        let outcome = judge(Err(error), 5, InsertOrder::Unordered);
        assert_eq!((outcome.inserted, outcome.unknown), (5, 0));
        assert_eq!(outcome.error.map(|error| error.kind()), Some(ErrorKind::Timeout));
    }

    #[test]
    fn refusals_and_an_unsatisfied_write_concern_are_both_told() {
        let reply = doc! {
            "writeErrors": [duplicate(1)],
            "writeConcernError": { "code": 100, "codeName": "UnsatisfiableWriteConcern", "errmsg": "Not enough data-bearing nodes" },
        };
        let outcome = judge(Err(DriverKind::InsertMany(partial(reply)).into()), 5, InsertOrder::Ordered);
        assert_eq!((outcome.inserted, outcome.failures.len()), (1, 1));
        assert_eq!(outcome.error.map(|error| error.kind()), Some(ErrorKind::InvalidInput));
    }

    #[test]
    fn a_lost_connection_leaves_the_batch_unknown() {
        let lost = DriverError::from(std::io::Error::from(std::io::ErrorKind::ConnectionReset));
        let outcome = judge(Err(lost), 7, InsertOrder::Unordered);
        assert_eq!((outcome.inserted, outcome.unknown), (0, 7));
        assert_eq!(outcome.error.map(|error| error.kind()), Some(ErrorKind::Unavailable));
    }
}
