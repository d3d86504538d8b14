//! Choosing documents of a snapshot by their `_id`s, without reading the others.

use std::{cmp::Ordering, fmt, sync::Arc};

use mongo_core::{
    Error, Result,
    bson::{Binary, Bson, RawBson, RawDocument, spec::BinarySubtype},
    transfer::partition::Key,
};

/// Documents by their `_id`s, as the server orders them without a collation.
///
/// ```
/// use mongo_backup::IdRange;
///
/// let one = IdRange::one("order-4711")?;
/// let some = IdRange::between(Some(1000.into()), Some(1999.into()))?;
/// # let _ = (one, some);
/// # Ok::<_, mongo_backup::Error>(())
/// ```
#[derive(Clone)]
pub struct IdRange {
    from: Option<Key>,
    to: Option<Key>,
}

impl fmt::Debug for IdRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // An `_id` is data, and often personal.
        f.write_str("IdRange")
    }
}

impl IdRange {
    /// One document. Numbers that are equal are one `_id`, whatever their types.
    ///
    /// # Errors
    /// `InvalidInput` for a value that BSON cannot hold.
    pub fn one(id: impl Into<Bson>) -> Result<Self> {
        let id = id.into();
        Self::between(Some(id.clone()), Some(id))
    }

    /// All from `from` to `to`, these included; from the first or to the last where there is none.
    ///
    /// # Errors
    /// `InvalidInput` for a value that BSON cannot hold, or a range that ends before it begins.
    pub fn between(from: Option<Bson>, to: Option<Bson>) -> Result<Self> {
        let key = |id: Bson| {
            RawBson::try_from(id).map(Key::from).map_err(|error| Error::invalid("this can be no _id").with_source(error))
        };
        let range = Self { from: from.map(key).transpose()?, to: to.map(key).transpose()? };
        if let (Some(from), Some(to)) = (&range.from, &range.to)
            && from.compare(to) == Ordering::Greater
        {
            return Err(Error::invalid("the range of _ids ends before it begins"));
        }
        Ok(range)
    }

    /// Both ends as bytes, to tell one range from another.
    pub(super) fn to_binary(&self) -> Binary {
        let end = |key: &Option<Key>| key.as_ref().map(|key| key.as_document().as_bytes().to_vec()).unwrap_or_default();
        let (from, to) = (end(&self.from), end(&self.to));
        Binary { subtype: BinarySubtype::Generic, bytes: [&from.len().to_le_bytes()[..], &from, &to].concat() }
    }

    /// Whether documents from the first of a part up to that of the next part, if there is one, can be in the range.
    pub(crate) fn may_hold(&self, first: &Key, next: Option<&Key>) -> bool {
        let begins_in_time = self.to.as_ref().is_none_or(|to| first.compare(to).is_le());
        let ends_late_enough = match (&self.from, next) {
            (Some(from), Some(next)) => from.compare(next).is_lt(),
            _ => true,
        };
        begins_in_time && ends_late_enough
    }

    pub(crate) fn contains(&self, id: &Key) -> bool {
        self.from.as_ref().is_none_or(|from| from.compare(id).is_le()) && self.to.as_ref().is_none_or(|to| id.compare(to).is_le())
    }
}

/// Which documents of the chosen namespaces are restored.
#[derive(Clone, Default)]
pub(super) struct DocumentChoice {
    pub(super) ids: Option<IdRange>,
    pub(super) filter: Option<DocumentFilter>,
}

/// Whether a document is wanted.
pub type DocumentFilter = Arc<dyn Fn(&RawDocument) -> bool + Send + Sync>;

impl fmt::Debug for DocumentChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DocumentChoice").field("ids", &self.ids.is_some()).field("filter", &self.filter.is_some()).finish()
    }
}

impl DocumentChoice {
    pub(super) fn is_everything(&self) -> bool {
        self.ids.is_none() && self.filter.is_none()
    }

    pub(super) fn takes(&self, document: &RawDocument) -> Result<bool> {
        if let Some(ids) = &self.ids
            && !ids.contains(&Key::of(document)?)
        {
            return Ok(false);
        }
        Ok(self.filter.as_ref().is_none_or(|filter| filter(document)))
    }
}
