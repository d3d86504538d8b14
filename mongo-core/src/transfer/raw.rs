//! Small helpers over raw BSON that the rooms of `transfer` share.

use std::io::Write as _;

use mongodb::{
    Database,
    bson::{RawBson, RawBsonRef, RawDocument, RawDocumentBuf},
    options::SelectionCriteria,
};

use crate::error::{Error, Result};

/// Runs a command that returns a cursor and collects every document of the reply, raw.
pub(super) async fn list(
    database: &Database,
    command: RawDocumentBuf,
    from: Option<&SelectionCriteria>,
) -> Result<Vec<RawDocumentBuf>> {
    use futures_util::TryStreamExt as _;
    let action = database.run_raw_cursor_command(command);
    let mut batches = match from {
        Some(criteria) => action.selection_criteria(criteria.clone()).batch().await?,
        None => action.batch().await?,
    };
    let mut documents = Vec::new();
    while let Some(batch) = batches.try_next().await? {
        for item in batch.doc_slices()? {
            documents.push(document(item?)?.to_owned());
        }
    }
    Ok(documents)
}

pub(super) fn document(value: RawBsonRef<'_>) -> Result<&RawDocument> {
    value.as_document().ok_or_else(|| Error::corrupt("the server sent something else where a document was due"))
}

/// A copy of `source` without the fields in `dropped`.
pub(super) fn without(source: &RawDocument, dropped: &[&str]) -> Result<RawDocumentBuf> {
    let mut copy = RawDocumentBuf::new();
    for field in source {
        let (name, value) = field?;
        if !dropped.contains(&name.as_str()) {
            copy.append(name, value);
        }
    }
    Ok(copy)
}

/// A command with a long array of documents in it, written in one pass: `head`, then `array` with `documents`, then `tail`.
///
/// The general builders copy each document three times on the way into a command, which doubles the memory of a bulk write.
pub(super) fn command_with<'a>(
    head: &RawDocument,
    array: &str,
    documents: impl Iterator<Item = &'a RawDocument> + Clone,
    tail: &RawDocument,
) -> Result<RawDocumentBuf> {
    let too_large = |_| Error::internal("a command of more than two gigabytes");
    let payload: usize = documents.clone().map(|document| document.as_bytes().len() + LONGEST_KEY).sum();
    let mut bytes = Vec::with_capacity(payload + head.as_bytes().len() + array.len() + tail.as_bytes().len() + 16);
    bytes.extend_from_slice(without_end(head));
    bytes.push(ARRAY);
    bytes.extend_from_slice(array.as_bytes());
    bytes.push(0);
    let start = bytes.len();
    bytes.extend_from_slice(&[0; 4]);
    for (position, document) in documents.enumerate() {
        bytes.push(DOCUMENT);
        write!(bytes, "{position}\0").map_err(|error| Error::internal("writing to memory failed").with_source(error))?;
        bytes.extend_from_slice(document.as_bytes());
    }
    bytes.push(0);
    let length = i32::try_from(bytes.len() - start).map_err(too_large)?;
    bytes[start..start + 4].copy_from_slice(&length.to_le_bytes());
    bytes.extend_from_slice(&without_end(tail)[4..]);
    bytes.push(0);
    let length = i32::try_from(bytes.len()).map_err(too_large)?;
    bytes[..4].copy_from_slice(&length.to_le_bytes());
    Ok(RawDocumentBuf::from_bytes(bytes)?)
}

/// Length and elements of a document, without the zero at its end.
fn without_end(document: &RawDocument) -> &[u8] {
    let bytes = document.as_bytes();
    bytes.strip_suffix(&[0]).unwrap_or(bytes)
}

const DOCUMENT: u8 = 0x03;
const ARRAY: u8 = 0x04;
/// The type, up to ten digits, and the zero.
const LONGEST_KEY: usize = 12;

/// The `_id` of a document, owned.
pub(super) fn id_of(document: &RawDocument) -> Result<RawBson> {
    // Servers store `_id` first; the search covers documents from elsewhere.
    let id = document.get("_id")?.ok_or_else(|| Error::corrupt("a document has no _id"))?;
    Ok(id.into())
}

#[cfg(test)]
mod tests {
    use mongodb::bson::{RawArrayBuf, rawdoc};

    use super::*;

    #[test]
    fn a_command_written_in_one_pass_is_the_command_that_the_general_builder_makes() {
        let documents: Vec<RawDocumentBuf> = (0..120).map(|number| rawdoc! { "_id": number, "x": [number] }).collect();
        let mut array = RawArrayBuf::new();
        documents.iter().for_each(|document| array.push(document.clone()));
        let expected = rawdoc! { "insert": "c", "documents": array, "ordered": false, "writeConcern": { "w": 1 } };
        let documents = documents.iter().map(AsRef::as_ref);
        let tail = rawdoc! { "ordered": false, "writeConcern": { "w": 1 } };
        assert_eq!(command_with(&rawdoc! { "insert": "c" }, "documents", documents, &tail).unwrap(), expected);
    }
}
