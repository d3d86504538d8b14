//! Changing documents on their way from one place to another.

#[cfg(any(test, feature = "testkit"))]
pub mod conformance;
mod new_ids;
mod paths;
mod redact;

use std::fmt;

use bson::{RawDocument, RawDocumentBuf};

pub use self::{
    new_ids::{NewIds, Reference},
    redact::{Redaction, Redactions},
};
use crate::{error::Result, namespace::Namespace};

/// Decides what becomes of each document.
///
/// It is asked on several threads, in no order, and now and then twice for one document: the same document must come out the same each time.
/// `conformance::check` (feature `testkit`) checks that on samples.
pub trait Transform: fmt::Debug + Send + Sync + 'static {
    /// What becomes of a document of a collection. Documents have an `_id`, as their first field, before and after.
    ///
    /// # Errors
    /// The transform's own; it ends the operation that asks, for a document that should have been changed must not slip through unchanged.
    fn apply(&self, namespace: &Namespace, document: &RawDocument) -> Result<Transformed>;

    /// Whether it may change `_id`s in a collection. Default no: then one that does is an error.
    fn changes_ids(&self, namespace: &Namespace) -> bool {
        let _ = namespace;
        false
    }
}

/// What becomes of a document.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Transformed {
    /// It stays as it is.
    Keep,
    /// It becomes another.
    Replace(RawDocumentBuf),
    /// It is left out.
    Drop,
    /// It becomes several, of the same collection.
    Split(Vec<RawDocumentBuf>),
}

/// Fails at one document out of some: for tests.
#[cfg(any(test, feature = "testkit"))]
#[derive(Debug)]
pub struct FailingTransform {
    left: std::sync::atomic::AtomicU64,
}

#[cfg(any(test, feature = "testkit"))]
impl FailingTransform {
    /// Fails when it is asked for the time after `good` times.
    pub fn after(good: u64) -> Self {
        Self { left: good.into() }
    }
}

#[cfg(any(test, feature = "testkit"))]
impl Transform for FailingTransform {
    fn apply(&self, _: &Namespace, _: &RawDocument) -> Result<Transformed> {
        use std::sync::atomic::Ordering::SeqCst;
        match self.left.fetch_update(SeqCst, SeqCst, |left| left.checked_sub(1)) {
            Ok(_) => Ok(Transformed::Keep),
            Err(_) => Err(crate::Error::internal("the transform fails, as it was told to")),
        }
    }
}
