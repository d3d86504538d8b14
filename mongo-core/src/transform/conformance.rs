//! What every [`Transform`] promises, checked on samples.

use bson::{RawDocument, RawDocumentBuf};

use super::{Transform, Transformed};
use crate::{
    error::{Error, Result},
    namespace::Namespace,
    transfer::{check_structure, leading_id},
};

/// Checks a transform on documents of a collection: it gives the same each time, only well-formed documents, each with an `_id` first, and
/// the same one unless it says otherwise.
///
/// # Errors
/// `Internal` naming the promise that is broken, or the transform's own.
pub fn check(transform: &dyn Transform, namespace: &Namespace, samples: &[RawDocumentBuf]) -> Result<()> {
    for sample in samples {
        let (first, second) = (transform.apply(namespace, sample)?, transform.apply(namespace, sample)?);
        if first != second {
            return Err(Error::internal("a transform gives another document each time"));
        }
        let results: Vec<&RawDocument> = match &first {
            Transformed::Keep | Transformed::Drop => Vec::new(),
            Transformed::Replace(document) => vec![document],
            Transformed::Split(documents) => documents.iter().map(AsRef::as_ref).collect(),
        };
        for result in results {
            check_structure(result)?;
            let id =
                leading_id(result.as_bytes()).ok_or_else(|| Error::internal("a transform gives a document without an _id"))?;
            let is_replaced = matches!(first, Transformed::Replace(_));
            if is_replaced && !transform.changes_ids(namespace) && Some(id) != leading_id(sample.as_bytes()) {
                return Err(Error::internal("a transform changes an _id and does not say so"));
            }
        }
    }
    Ok(())
}
