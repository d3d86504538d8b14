//! Small helpers over raw BSON that the rooms of `transfer` share.

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

/// The `_id` of a document, owned.
pub(super) fn id_of(document: &RawDocument) -> Result<RawBson> {
    // Servers store `_id` first; the search covers documents from elsewhere.
    let id = document.get("_id")?.ok_or_else(|| Error::corrupt("a document has no _id"))?;
    Ok(id.into())
}
