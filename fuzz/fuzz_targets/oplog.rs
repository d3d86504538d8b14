//! Entries of an oplog, the updates in them, and documents that are changed on their way.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mongo_core::{
    bson::RawDocument,
    transfer::{
        oplog::{Effect, Entry, Transactions},
        replay::apply_update,
    },
    transform::{NewIds, Redaction, Redactions, Transform as _},
};

fuzz_target!(|bytes: &[u8]| {
    let (entry, document) = bytes.split_at(bytes.len() / 2);
    let (Ok(entry), Ok(document)) = (framed(entry), framed(document)) else { return };
    let (Ok(entry), Ok(document)) = (RawDocument::from_bytes(&entry), RawDocument::from_bytes(&document)) else { return };
    if let Ok(after) = apply_update(document, entry) {
        let _ = apply_update(&after, entry);
    }
    if let (Ok(namespace), Ok(redactions)) = ("a.b".parse(), Redactions::new("key").rule("*", "a.b", Redaction::Hash)) {
        let _ = redactions.apply(&namespace, document);
        let _ = NewIds::new("key").apply(&namespace, document);
    }
    let mut transactions = Transactions::new(64);
    if let Ok(entry) = Entry::parse(entry)
        && let Ok(Effect::Many(mut group)) = transactions.take(&entry)
    {
        while let Ok(Some(carried)) = group.next_carried() {
            let _ = carried.actions();
        }
    }
});

/// The bytes as the content of a document: most would fail at its length otherwise.
fn framed(content: &[u8]) -> Result<Vec<u8>, std::num::TryFromIntError> {
    let length = i32::try_from(content.len() + 5)?;
    Ok([&length.to_le_bytes()[..], content, &[0]].concat())
}
