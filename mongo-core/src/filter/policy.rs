//! Which operators a user's filter may hold.

use std::collections::BTreeSet;

/// Which operators a user's filter may hold.
///
/// The default allows [`OperatorGroup::Comparison`], [`Logical`](OperatorGroup::Logical),
/// [`Element`](OperatorGroup::Element), [`Array`](OperatorGroup::Array), [`Bitwise`](OperatorGroup::Bitwise) and
/// [`Geospatial`](OperatorGroup::Geospatial). It leaves out what runs code (`$where`, `$expr`, `$function`,
/// `$accumulator`), what can be made to cost without bound (`$regex`, `$jsonSchema`), what needs an index of its own
/// (`$text`), and whatever it does not know, which includes what later servers will bring.
///
/// Every key that begins with `$` counts as an operator, wherever it stands. A regular expression as a *value*
/// (`{name: /^a/}`) counts as `$regex`, and JavaScript code as a value as `$where`.
///
/// References between collections (`{$ref: …, $id: …, $db: …}`) are refused by default too: they are operators by
/// their names. [`OperatorGroup::DbRef`] allows them.
///
/// ```
/// use mongo_core::bson::doc;
/// use mongo_core::filter::{FilterPolicy, OperatorGroup, check_filter};
///
/// let policy = FilterPolicy::default().with_group(OperatorGroup::Regex).without_operator("$nin");
/// assert!(check_filter(&doc! { "name": { "$regex": "^a" } }, &policy).is_ok());
/// assert!(check_filter(&doc! { "$where": "sleep(1000)" }, &policy).is_err());
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(default))]
#[non_exhaustive]
pub struct FilterPolicy {
    /// The operators that are allowed, each with its `$`.
    pub operators: BTreeSet<String>,
    /// How deep documents and arrays may be nested; the filter itself is depth 1. Default 32, at most 100, as a
    /// server reads no deeper.
    pub max_depth: usize,
    /// What cleaning does with a condition that is not allowed. Default [`Removal::Narrow`].
    pub removal: Removal,
}

impl Default for FilterPolicy {
    fn default() -> Self {
        [
            OperatorGroup::Comparison,
            OperatorGroup::Logical,
            OperatorGroup::Element,
            OperatorGroup::Array,
            OperatorGroup::Bitwise,
            OperatorGroup::Geospatial,
        ]
        .into_iter()
        .fold(Self::no_operators(), Self::with_group)
    }
}

impl FilterPolicy {
    /// Allows fields and values only: for values that a user gives, and for filters that an application builds from them.
    ///
    /// ```
    /// use mongo_core::bson::doc;
    /// use mongo_core::filter::{FilterPolicy, check_filter};
    ///
    /// let login = doc! { "user": "ada", "password": { "$ne": null } };
    /// assert!(check_filter(&login, &FilterPolicy::no_operators()).is_err());
    /// ```
    pub fn no_operators() -> Self {
        Self { operators: BTreeSet::new(), max_depth: 32, removal: Removal::Narrow }
    }

    /// Allows one more operator, written with its `$`. What stands inside it is checked all the same.
    #[must_use]
    pub fn with_operator(mut self, operator: impl Into<String>) -> Self {
        self.operators.insert(operator.into());
        self
    }

    /// Allows all operators of a group.
    #[must_use]
    pub fn with_group(mut self, group: OperatorGroup) -> Self {
        self.operators.extend(group.operators().iter().map(|&operator| operator.to_owned()));
        self
    }

    /// Forbids an operator.
    #[must_use]
    pub fn without_operator(mut self, operator: &str) -> Self {
        self.operators.remove(operator);
        self
    }

    /// Forbids all operators of a group.
    #[must_use]
    pub fn without_group(mut self, group: OperatorGroup) -> Self {
        for operator in group.operators() {
            self.operators.remove(*operator);
        }
        self
    }

    /// Sets how deep documents and arrays may be nested.
    #[must_use]
    pub fn with_max_depth(mut self, depth: usize) -> Self {
        self.max_depth = depth;
        self
    }

    /// Sets what cleaning does with a condition that is not allowed.
    #[must_use]
    pub fn with_removal(mut self, removal: Removal) -> Self {
        self.removal = removal;
        self
    }

    /// Whether `operator`, written with its `$`, is allowed.
    pub fn allows(&self, operator: &str) -> bool {
        self.operators.contains(operator)
    }
}

/// Operators that are allowed or forbidden together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum OperatorGroup {
    /// `$eq $ne $gt $gte $lt $lte $in $nin`
    Comparison,
    /// `$and $or $nor $not`
    Logical,
    /// `$exists $type`
    Element,
    /// `$all $elemMatch $size`
    Array,
    /// `$bitsAllClear $bitsAllSet $bitsAnyClear $bitsAnySet $mod`
    Bitwise,
    /// `$geoWithin $geoIntersects $near $nearSphere` and what stands inside and beside them
    Geospatial,
    /// `$regex $options`, and regular expressions as values. A pattern that backtracks, or one that is not anchored on an
    /// indexed field, makes a query cost as much as its author likes: set `maxTimeMS`.
    Regex,
    /// `$text` and what stands inside it. Needs a text index.
    Text,
    /// `$ref $id $db`: references between collections, as values.
    DbRef,
    /// `$comment`, which is copied into the server's log.
    Comment,
}

impl OperatorGroup {
    /// The operators of the group.
    pub fn operators(self) -> &'static [&'static str] {
        match self {
            Self::Comparison => &["$eq", "$ne", "$gt", "$gte", "$lt", "$lte", "$in", "$nin"],
            Self::Logical => &["$and", "$or", "$nor", "$not"],
            Self::Element => &["$exists", "$type"],
            Self::Array => &["$all", "$elemMatch", "$size"],
            Self::Bitwise => &["$bitsAllClear", "$bitsAllSet", "$bitsAnyClear", "$bitsAnySet", "$mod"],
            Self::Geospatial => &[
                "$geoWithin",
                "$geoIntersects",
                "$near",
                "$nearSphere",
                "$geometry",
                "$minDistance",
                "$maxDistance",
                "$box",
                "$center",
                "$centerSphere",
                "$polygon",
            ],
            Self::Regex => &["$regex", "$options"],
            Self::Text => &["$text", "$search", "$language", "$caseSensitive", "$diacriticSensitive"],
            Self::DbRef => &["$ref", "$id", "$db"],
            Self::Comment => &["$comment"],
        }
    }
}

/// What [`clean_filter`](super::clean_filter) does with a condition that is not allowed; see the [module](super) for examples.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum Removal {
    /// It counts as not fulfilled, so that the cleaned filter matches no document that the original would not match.
    #[default]
    Narrow,
    /// It is left out, as if the user had not written it. The cleaned filter may match more than the original: for
    /// reads, beside a filter of your own, and never for deletes.
    Drop,
}
