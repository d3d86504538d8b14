//! Looking through a filter, and taking out of it what a policy does not allow.

use std::{borrow::Cow, fmt};

use mongodb::bson::{Bson, Document, doc};

use super::policy::{FilterPolicy, OperatorGroup, Removal};
use crate::error::{Error, Result};

/// A filter that holds only what a policy allows.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct CleanedFilter {
    /// The filter to run.
    pub filter: Document,
    /// What was taken out, in the order of the original.
    pub removed: Vec<ForbiddenOperator>,
    /// Whether cleaning left a filter that matches nothing: the query can be saved.
    pub matches_nothing: bool,
}

/// An operator that a policy does not allow, and where it stood.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct ForbiddenOperator {
    /// Field names, operators and positions from the top, for example `$or.1.age.$where`. Control characters are escaped
    /// and long names cut, so it is fit for a log.
    pub path: String,
    /// The operator, as the policy names it.
    pub operator: String,
}

impl fmt::Display for ForbiddenOperator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {}", self.operator, self.path)
    }
}

/// Refuses a filter that holds anything that the policy does not allow.
///
/// # Errors
/// [`ErrorKind::InvalidInput`](crate::ErrorKind::InvalidInput), naming the operators and where they stand, or that the
/// filter is nested too deeply.
///
/// # Examples
/// ```
/// use mongo_core::bson::doc;
/// use mongo_core::filter::{FilterPolicy, check_filter};
///
/// let policy = FilterPolicy::default();
/// assert!(check_filter(&doc! { "age": { "$gte": 18 } }, &policy).is_ok());
/// let error = check_filter(&doc! { "$or": [{ "a": 1 }, { "$where": "1" }] }, &policy).unwrap_err();
/// assert_eq!(error.to_string(), "the filter holds operators that are not allowed (operators: $where at $or.1.$where)");
/// ```
pub fn check_filter(filter: &Document, policy: &FilterPolicy) -> Result<()> {
    check_depth(filter, policy)?;
    let mut inspector = Inspector::new(policy);
    inspector.document(filter);
    let Some(first) = inspector.found.first() else { return Ok(()) };
    let mut named = first.to_string();
    for forbidden in inspector.found.iter().skip(1).take(9) {
        named.push_str(", ");
        named.push_str(&forbidden.to_string());
    }
    if inspector.found.len() > 10 {
        named.push_str(&format!(" and {} more", inspector.found.len() - 10));
    }
    Err(Error::invalid("the filter holds operators that are not allowed").with_context("operators", named))
}

/// Takes out of a filter what the policy does not allow, at any depth.
///
/// What is left means what the policy's [`Removal`] says: read the [module](super) before you run it. A filter in which
/// everything is allowed comes back as it is.
///
/// # Errors
/// [`ErrorKind::InvalidInput`](crate::ErrorKind::InvalidInput) when the filter is nested too deeply: what cannot be
/// looked through is not passed on.
///
/// # Examples
/// ```
/// use mongo_core::bson::doc;
/// use mongo_core::filter::{FilterPolicy, Removal, clean_filter};
///
/// let from_user = doc! { "age": { "$gte": 18 }, "$where": "sleep(10000)" };
///
/// let narrowed = clean_filter(from_user.clone(), &FilterPolicy::default())?;
/// assert!(narrowed.matches_nothing, "who knows what the user wanted of $where");
///
/// let dropped = clean_filter(from_user, &FilterPolicy::default().with_removal(Removal::Drop))?;
/// assert_eq!(dropped.filter, doc! { "age": { "$gte": 18 } });
/// assert_eq!(dropped.removed[0].path, "$where");
/// # Ok::<(), mongo_core::Error>(())
/// ```
pub fn clean_filter(filter: Document, policy: &FilterPolicy) -> Result<CleanedFilter> {
    check_depth(&filter, policy)?;
    let mut cleaner = Cleaner { inspector: Inspector::new(policy), removal: policy.removal };
    let cleaned = cleaner.conjunction(filter, Side::Fulfilled);
    let removed = cleaner.inspector.found;
    Ok(match cleaned {
        Part::Kept(filter) => CleanedFilter { filter, removed, matches_nothing: false },
        Part::Never | Part::Always | Part::Gone => {
            CleanedFilter { filter: doc! { "_id": { "$in": [] } }, removed, matches_nothing: true }
        }
    })
}

/// Servers refuse documents that are nested deeper than about twice this.
const DEEPEST: usize = 100;

fn check_depth(filter: &Document, policy: &FilterPolicy) -> Result<()> {
    let limit = policy.max_depth.clamp(1, DEEPEST);
    if filter.values().all(|value| is_shallow(value, limit - 1)) {
        return Ok(());
    }
    Err(Error::invalid("the filter is nested too deeply").with_context("limit", limit))
}

/// Whether no more than `levels` documents and arrays stand inside each other here. Looks no deeper than that.
fn is_shallow(value: &Bson, levels: usize) -> bool {
    match value {
        Bson::Document(document) => levels > 0 && document.values().all(|value| is_shallow(value, levels - 1)),
        Bson::Array(values) => levels > 0 && values.iter().all(|value| is_shallow(value, levels - 1)),
        _ => true,
    }
}

/// Finds what is not allowed, and remembers where.
struct Inspector<'p> {
    policy: &'p FilterPolicy,
    path: Vec<String>,
    found: Vec<ForbiddenOperator>,
}

impl<'p> Inspector<'p> {
    fn new(policy: &'p FilterPolicy) -> Self {
        Self { policy, path: Vec::new(), found: Vec::new() }
    }

    /// Looks at everything in a document. What stands inside a forbidden operator is not listed again.
    fn document(&mut self, document: &Document) {
        for (key, value) in document {
            self.entry(key, value);
        }
    }

    fn entry(&mut self, key: &str, value: &Bson) {
        self.within(key, |inspector| if inspector.forbids(key) { inspector.report(key) } else { inspector.value(value) });
    }

    fn value(&mut self, value: &Bson) {
        match value {
            Bson::Document(document) => self.document(document),
            Bson::Array(values) => {
                for (position, value) in values.iter().enumerate() {
                    self.within(&position.to_string(), |inspector| inspector.value(value));
                }
            }
            Bson::RegularExpression(_) if self.forbids("$regex") => self.report("$regex"),
            Bson::JavaScriptCode(_) | Bson::JavaScriptCodeWithScope(_) if self.forbids("$where") => self.report("$where"),
            _ => {}
        }
    }

    fn forbids(&self, key: &str) -> bool {
        key.starts_with('$') && !self.policy.allows(key)
    }

    fn report(&mut self, operator: &str) {
        let path = self.path.join(".");
        self.found.push(ForbiddenOperator { path, operator: printable(operator).into_owned() });
    }

    fn within(&mut self, key: &str, look: impl FnOnce(&mut Self)) {
        self.path.push(printable(key).into_owned());
        look(self);
        self.path.pop();
    }

    /// Looks, and says whether anything was found.
    fn finds(&mut self, look: impl FnOnce(&mut Self)) -> bool {
        let before = self.found.len();
        look(self);
        self.found.len() > before
    }
}

/// A key that is fit for a log.
fn printable(key: &str) -> Cow<'_, str> {
    const LONGEST: usize = 64;
    if key.len() <= LONGEST && !key.chars().any(char::is_control) {
        return Cow::Borrowed(key);
    }
    let mut shown: String = key.chars().take(LONGEST).flat_map(char::escape_debug).collect();
    if key.chars().nth(LONGEST).is_some() {
        shown.push('…');
    }
    Cow::Owned(shown)
}

/// Which way an unknown condition has to be answered for the whole filter to match less.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    /// Where a fulfilled condition lets more documents through.
    Fulfilled,
    /// Under an odd number of negations, where it lets fewer through.
    Unfulfilled,
}

impl Side {
    fn negated(self) -> Self {
        match self {
            Self::Fulfilled => Self::Unfulfilled,
            Self::Unfulfilled => Self::Fulfilled,
        }
    }
}

/// What is left of a condition.
enum Part<C> {
    Kept(C),
    /// It is known to be unfulfilled.
    Never,
    /// It is known to be fulfilled.
    Always,
    /// There is no condition any more.
    Gone,
}

impl<C> Part<C> {
    fn negated(self) -> Self {
        match self {
            Self::Never => Self::Always,
            Self::Always => Self::Never,
            same => same,
        }
    }

    fn map<D>(self, wrap: impl FnOnce(C) -> D) -> Part<D> {
        match self {
            Self::Kept(condition) => Part::Kept(wrap(condition)),
            Self::Never => Part::Never,
            Self::Always => Part::Always,
            Self::Gone => Part::Gone,
        }
    }
}

struct Cleaner<'p> {
    inspector: Inspector<'p>,
    removal: Removal,
}

impl Cleaner<'_> {
    /// A document of conditions that must all hold: a filter, or the operators of one field.
    fn conjunction(&mut self, document: Document, side: Side) -> Part<Document> {
        if document.is_empty() {
            return Part::Kept(document);
        }
        // These change the meaning of the operators beside them, so they stand and fall together.
        if ["$regex", "$near", "$nearSphere"].iter().any(|modified| document.contains_key(modified)) {
            return if self.inspector.finds(|inspector| inspector.document(&document)) {
                self.forbidden(side)
            } else {
                Part::Kept(document)
            };
        }
        let parts = document
            .into_iter()
            .map(|(key, value)| {
                self.inspector.path.push(printable(&key).into_owned());
                let part = self.condition(&key, value, side).map(|value| (key, value));
                self.inspector.path.pop();
                part
            })
            .collect();
        all(parts).map(|kept| kept.into_iter().collect())
    }

    /// One condition: an operator or a field, with its operand. The path already names it.
    fn condition(&mut self, key: &str, value: Bson, side: Side) -> Part<Bson> {
        if self.inspector.forbids(key) {
            self.inspector.report(key);
            return self.forbidden(side);
        }
        match (key, value) {
            ("$and", Bson::Array(branches)) if are_documents(&branches) => {
                let parts = self.branches(branches, side);
                all(parts).map(Bson::Array)
            }
            ("$or", Bson::Array(branches)) if are_documents(&branches) => {
                let parts = self.branches(branches, side);
                any(parts).map(Bson::Array)
            }
            ("$nor", Bson::Array(branches)) if are_documents(&branches) => {
                let parts = self.branches(branches, side.negated());
                any(parts).negated().map(Bson::Array)
            }
            ("$not", Bson::Document(operators)) => self.conjunction(operators, side.negated()).negated().map(Bson::Document),
            ("$elemMatch", Bson::Document(conditions)) => self.conjunction(conditions, side).map(Bson::Document),
            ("$in", Bson::Array(values)) => {
                let parts = self.values(values, side);
                any(parts).map(Bson::Array)
            }
            ("$nin", Bson::Array(values)) => {
                let parts = self.values(values, side.negated());
                any(parts).negated().map(Bson::Array)
            }
            ("$all", Bson::Array(values)) => {
                let parts = self.values(values, side);
                all(parts).map(Bson::Array)
            }
            // The server tells operators from a document to compare with by the first key.
            (field, Bson::Document(operators)) if !field.starts_with('$') && begins_with_operator(&operators) => {
                self.conjunction(operators, side).map(Bson::Document)
            }
            (_, value) => self.whole(value, side),
        }
    }

    fn branches(&mut self, branches: Vec<Bson>, side: Side) -> Vec<Part<Bson>> {
        self.each(branches, |cleaner, branch| match branch {
            Bson::Document(branch) => cleaner.conjunction(branch, side).map(Bson::Document),
            other => cleaner.whole(other, side),
        })
    }

    fn values(&mut self, values: Vec<Bson>, side: Side) -> Vec<Part<Bson>> {
        self.each(values, |cleaner, value| cleaner.whole(value, side))
    }

    fn each(&mut self, values: Vec<Bson>, clean: impl Fn(&mut Self, Bson) -> Part<Bson>) -> Vec<Part<Bson>> {
        values
            .into_iter()
            .enumerate()
            .map(|(position, value)| {
                self.inspector.path.push(position.to_string());
                let part = clean(self, value);
                self.inspector.path.pop();
                part
            })
            .collect()
    }

    /// A value that is kept or removed as a whole.
    fn whole(&mut self, value: Bson, side: Side) -> Part<Bson> {
        if self.inspector.finds(|inspector| inspector.value(&value)) { self.forbidden(side) } else { Part::Kept(value) }
    }

    fn forbidden<C>(&self, side: Side) -> Part<C> {
        match (self.removal, side) {
            (Removal::Drop, _) => Part::Gone,
            (Removal::Narrow, Side::Fulfilled) => Part::Never,
            (Removal::Narrow, Side::Unfulfilled) => Part::Always,
        }
    }
}

fn are_documents(values: &[Bson]) -> bool {
    values.iter().all(|value| matches!(value, Bson::Document(_)))
}

fn begins_with_operator(document: &Document) -> bool {
    document.keys().next().is_some_and(|key| {
        // A reference between collections is a value although its keys begin with `$`.
        key.starts_with('$') && !OperatorGroup::DbRef.operators().contains(&key.as_str())
    })
}

/// Conditions that must all hold.
fn all<C>(parts: Vec<Part<C>>) -> Part<Vec<C>> {
    combine(parts, |part| matches!(part, Part::Never), Part::Never, Part::Always)
}

/// Conditions of which one must hold.
fn any<C>(parts: Vec<Part<C>>) -> Part<Vec<C>> {
    combine(parts, |part| matches!(part, Part::Always), Part::Always, Part::Never)
}

/// `decides`: a part that settles the whole, as `decided`. `neutral`: what the whole is when no part has a say.
fn combine<C>(parts: Vec<Part<C>>, decides: fn(&Part<C>) -> bool, decided: Part<Vec<C>>, neutral: Part<Vec<C>>) -> Part<Vec<C>> {
    if parts.iter().any(decides) {
        return decided;
    }
    let empty = parts.is_empty();
    let some_gone = parts.iter().any(|part| matches!(part, Part::Gone));
    let kept: Vec<C> =
        parts.into_iter().filter_map(|part| if let Part::Kept(condition) = part { Some(condition) } else { None }).collect();
    if !kept.is_empty() || empty {
        // An empty list is the user's own: `{$in: []}` is a condition, and the server refuses `{$or: []}`.
        return Part::Kept(kept);
    }
    if some_gone { Part::Gone } else { neutral }
}

#[cfg(test)]
mod tests {
    use mongodb::bson::{JavaScriptCodeWithScope, Regex, cstr};
    use proptest::prelude::{any, *};

    use super::*;

    fn regex(pattern: &str) -> Bson {
        Bson::RegularExpression(Regex { pattern: pattern.to_owned().try_into().unwrap(), options: cstr!("").to_owned() })
    }

    fn narrow(filter: Document) -> CleanedFilter {
        clean_filter(filter, &FilterPolicy::default()).unwrap()
    }

    fn drop_from(filter: Document) -> CleanedFilter {
        clean_filter(filter, &FilterPolicy::default().with_removal(Removal::Drop)).unwrap()
    }

    fn paths(filter: &Document) -> Vec<String> {
        let policy = FilterPolicy::default();
        let mut inspector = Inspector::new(&policy);
        inspector.document(filter);
        inspector.found.into_iter().map(|found| found.path).collect()
    }

    #[test]
    fn what_is_allowed_comes_back_as_it_is() {
        let filter = doc! {
            "age": { "$gte": 18, "$not": { "$in": [20, 30] } },
            "$or": [{ "a": 1 }, { "b": { "$elemMatch": { "c": { "$exists": true } } } }],
            "plain": { "nested": { "document": [1, { "x": 2 }] } },
            "at": { "$geoWithin": { "$centerSphere": [[2.0, 48.0], 0.1] } },
        };
        let cleaned = narrow(filter.clone());
        assert_eq!((cleaned.filter, cleaned.removed.len(), cleaned.matches_nothing), (filter, 0, false));
        assert_eq!(narrow(doc! {}).filter, doc! {});
    }

    #[test]
    fn forbidden_operators_are_found_at_any_depth() {
        assert_eq!(paths(&doc! { "$where": "1" }), ["$where"]);
        assert_eq!(paths(&doc! { "$or": [{ "a": 1 }, { "$and": [{ "$expr": true }] }] }), ["$or.1.$and.0.$expr"]);
        assert_eq!(paths(&doc! { "a": { "$not": { "$elemMatch": { "$where": "1" } } } }), ["a.$not.$elemMatch.$where"]);
        assert_eq!(paths(&doc! { "a": { "b": [{ "c": { "$function": {} } }] } }), ["a.b.0.c.$function"]);
        assert_eq!(paths(&doc! { "a": { "$in": [1, { "$where": "1" }] } }), ["a.$in.1.$where"]);
        assert_eq!(paths(&doc! { "$jsonSchema": {}, "$newInServer9": 1 }), ["$jsonSchema", "$newInServer9"]);
    }

    #[test]
    fn values_that_act_as_operators_count_as_such() {
        assert_eq!(paths(&doc! { "a": regex("^x") }), ["a"]);
        assert_eq!(paths(&doc! { "a": { "$in": [regex("^x")] } }), ["a.$in.0"]);
        assert_eq!(paths(&doc! { "a": { "$not": regex("x") } }), ["a.$not"]);
        assert_eq!(paths(&doc! { "a": Bson::JavaScriptCode("x".to_owned()) }), ["a"]);
        let scoped = JavaScriptCodeWithScope { code: "x".to_owned(), scope: doc! {} };
        assert_eq!(paths(&doc! { "a": Bson::JavaScriptCodeWithScope(scoped) }), ["a"]);
        let policy = FilterPolicy::default().with_group(OperatorGroup::Regex);
        assert!(check_filter(&doc! { "a": regex("^x") }, &policy).is_ok());
    }

    #[test]
    fn references_between_collections_are_operators_unless_allowed() {
        let filter = doc! { "owner": { "$ref": "users", "$id": 7 } };
        assert!(narrow(filter.clone()).matches_nothing);
        let policy = FilterPolicy::default().with_group(OperatorGroup::DbRef);
        assert_eq!(clean_filter(filter.clone(), &policy).unwrap().filter, filter);
    }

    #[test]
    fn narrowing_never_lets_more_through() {
        assert!(narrow(doc! { "a": 1, "$where": "1" }).matches_nothing);
        assert_eq!(narrow(doc! { "$or": [{ "a": 1 }, { "$where": "1" }] }).filter, doc! { "$or": [{ "a": 1 }] });
        assert!(narrow(doc! { "$or": [{ "$where": "1" }] }).matches_nothing);
        assert!(narrow(doc! { "$nor": [{ "a": 1 }, { "$where": "1" }] }).matches_nothing);
        assert_eq!(
            narrow(doc! { "$nor": [{ "a": 1, "$where": "1" }] }).filter,
            doc! { "$nor": [{ "a": 1 }] },
            "the more is excluded, the less gets through"
        );
        assert_eq!(narrow(doc! { "a": { "$in": [1, regex("x")] } }).filter, doc! { "a": { "$in": [1] } });
        assert!(narrow(doc! { "a": { "$nin": [1, regex("x")] } }).matches_nothing);
        assert!(narrow(doc! { "a": { "$not": regex("x") } }).matches_nothing);
    }

    #[test]
    fn dropping_leaves_the_other_conditions() {
        assert_eq!(drop_from(doc! { "a": 1, "$where": "1" }).filter, doc! { "a": 1 });
        assert_eq!(drop_from(doc! { "a": { "$gt": 1, "$bad": 2 }, "b": { "$bad": 3 } }).filter, doc! { "a": { "$gt": 1 } });
        assert_eq!(drop_from(doc! { "b": 1, "$or": [{ "$where": "1" }] }).filter, doc! { "b": 1 });
        assert_eq!(drop_from(doc! { "$nor": [{ "a": 1 }, { "$where": "1" }] }).filter, doc! { "$nor": [{ "a": 1 }] });
    }

    #[test]
    fn nothing_left_is_nothing_matched() {
        for filter in [
            doc! { "$where": "1" },
            doc! { "$or": [{ "$where": "1" }] },
            doc! { "$and": [{ "$nor": [{ "$expr": true }] }] },
            doc! { "a": { "$not": { "$bad": 1 } } },
            doc! { "a": { "$elemMatch": { "$where": "1" } } },
            doc! { "a": { "$nin": [regex("x")] } },
        ] {
            for cleaned in [narrow(filter.clone()), drop_from(filter.clone())] {
                assert!(cleaned.matches_nothing, "{filter}");
                assert_eq!(cleaned.filter, doc! { "_id": { "$in": [] } });
                assert_eq!(cleaned.removed.len(), 1);
            }
        }
    }

    #[test]
    fn a_document_to_compare_with_is_not_cut() {
        // The first key makes it a value, and a value without one of its fields is another value.
        let filter = doc! { "a": { "x": 1, "$where": "1" }, "b": 2 };
        assert!(narrow(filter.clone()).matches_nothing);
        assert_eq!(drop_from(filter).filter, doc! { "b": 2 });
    }

    #[test]
    fn operators_that_modify_each_other_are_not_torn_apart() {
        let policy = FilterPolicy::default().with_operator("$regex").with_removal(Removal::Drop);
        let cleaned = clean_filter(doc! { "a": { "$regex": "x", "$options": "i" }, "b": 1 }, &policy).unwrap();
        assert_eq!(cleaned.filter, doc! { "b": 1 });
    }

    #[test]
    fn depth_is_bounded_and_looked_at_without_deep_recursion() {
        let nested = |levels: usize| (1..levels).fold(doc! {}, |inner, _| doc! { "a": inner });
        let policy = FilterPolicy::default().with_max_depth(5);
        assert!(check_filter(&nested(5), &policy).is_ok());
        assert!(check_filter(&nested(6), &policy).is_err());
        assert!(clean_filter(nested(6), &policy).is_err());
        assert!(clean_filter(doc! { "a": [[[[[1]]]]] }, &policy).is_err());
    }

    #[test]
    fn paths_are_fit_for_a_log() {
        let key = format!("$evil\n{}", "x".repeat(100));
        let found = paths(&doc! { key: 1 });
        assert!(!found[0].contains('\n') && found[0].chars().count() < 80, "{found:?}");
    }

    // The server's logic in small, to compare what a filter means before and after cleaning. `a` and `b` are small
    // integers. What is forbidden has a meaning that the cleaner cannot know: it is looked up in `unknown`.
    mod meaning {
        use super::*;

        pub(super) fn holds(filter: &Document, at: &Document, unknown: u16) -> bool {
            filter.iter().all(|(key, value)| match (key.as_str(), value) {
                ("$and", Bson::Array(branches)) => branches.iter().all(|branch| branch_holds(branch, at, unknown)),
                ("$or", Bson::Array(branches)) => branches.iter().any(|branch| branch_holds(branch, at, unknown)),
                ("$nor", Bson::Array(branches)) => !branches.iter().any(|branch| branch_holds(branch, at, unknown)),
                ("$bad", value) => bit(value, unknown),
                (field, Bson::Document(operators)) => field_holds(operators, at.get(field), unknown),
                (field, value) => equals(value, at.get(field), unknown),
            })
        }

        fn branch_holds(branch: &Bson, at: &Document, unknown: u16) -> bool {
            branch.as_document().is_some_and(|branch| holds(branch, at, unknown))
        }

        fn field_holds(operators: &Document, field: Option<&Bson>, unknown: u16) -> bool {
            operators.iter().all(|(operator, operand)| match (operator.as_str(), operand) {
                ("$bad", value) => bit(value, unknown),
                ("$not", Bson::Document(inner)) => !field_holds(inner, field, unknown),
                ("$in", Bson::Array(values)) => values.iter().any(|value| equals(value, field, unknown)),
                ("$nin", Bson::Array(values)) => !values.iter().any(|value| equals(value, field, unknown)),
                ("$gt", Bson::Int32(least)) => field.and_then(Bson::as_i32).is_some_and(|value| value > *least),
                ("$ne", value) => field != Some(value),
                other => panic!("{other:?}"),
            })
        }

        fn equals(value: &Bson, field: Option<&Bson>, unknown: u16) -> bool {
            match value {
                Bson::RegularExpression(regex) => bit(&Bson::Int32(regex.pattern.as_str().parse().unwrap()), unknown),
                value => field == Some(value),
            }
        }

        fn bit(which: &Bson, unknown: u16) -> bool {
            (unknown >> which.as_i32().unwrap()) & 1 == 1
        }
    }

    fn a_value() -> impl Strategy<Value = Bson> {
        prop_oneof![4 => (0..4_i32).prop_map(Bson::Int32), 1 => (0..16_i32).prop_map(|n| regex(&n.to_string()))]
    }

    fn some_operators() -> impl Strategy<Value = Document> {
        let leaf = prop_oneof![
            (0..16_i32).prop_map(|n| ("$bad", Bson::Int32(n))),
            (0..4_i32).prop_map(|n| ("$gt", Bson::Int32(n))),
            (0..4_i32).prop_map(|n| ("$ne", Bson::Int32(n))),
            prop::collection::vec(a_value(), 0..3).prop_map(|values| ("$in", Bson::Array(values))),
            prop::collection::vec(a_value(), 0..3).prop_map(|values| ("$nin", Bson::Array(values))),
        ];
        let operators = prop::collection::vec(leaf, 1..3)
            .prop_map(|operators| operators.into_iter().map(|(name, value)| (name.to_owned(), value)).collect::<Document>());
        operators.prop_recursive(3, 8, 2, |inner| {
            (inner.clone(), inner).prop_map(|(mut beside, inner)| {
                beside.insert("$not", inner);
                beside
            })
        })
    }

    fn a_filter() -> impl Strategy<Value = Document> {
        let field = prop_oneof![Just("a"), Just("b")];
        let leaf = prop_oneof![
            (field.clone(), a_value()).prop_map(|(field, value)| doc! { field: value }),
            (field, some_operators()).prop_map(|(field, operators)| doc! { field: operators }),
            (0..16_i32).prop_map(|n| doc! { "$bad": n }),
        ];
        leaf.prop_recursive(4, 24, 3, |inner| {
            let name = prop_oneof![Just("$and"), Just("$or"), Just("$nor")];
            (name, prop::collection::vec(inner.clone(), 1..4), inner).prop_map(|(name, branches, beside)| {
                let mut filter = doc! { name: branches };
                filter.extend(beside);
                filter
            })
        })
    }

    proptest! {
        #[test]
        fn a_cleaned_filter_holds_nothing_forbidden(filter in a_filter()) {
            for removal in [Removal::Narrow, Removal::Drop] {
                let policy = FilterPolicy::default().with_removal(removal);
                let cleaned = clean_filter(filter.clone(), &policy).unwrap();
                prop_assert!(check_filter(&cleaned.filter, &policy).is_ok(), "{} from {filter}", cleaned.filter);
                prop_assert_eq!(cleaned.removed.is_empty(), check_filter(&filter, &policy).is_ok());
                if cleaned.removed.is_empty() {
                    prop_assert_eq!(&cleaned.filter, &filter);
                }
                // What the user wrote has a condition, so what is left has one too: it never matches everything by default.
                prop_assert!(!cleaned.filter.is_empty());
            }
        }

        #[test]
        fn a_narrowed_filter_matches_no_document_that_the_original_does_not(filter in a_filter(), unknown in any::<u16>()) {
            let cleaned = clean_filter(filter.clone(), &FilterPolicy::default()).unwrap();
            for a in 0..4 {
                for b in 0..4 {
                    let at = doc! { "a": a, "b": b };
                    let before = meaning::holds(&filter, &at, unknown);
                    let after = !cleaned.matches_nothing && meaning::holds(&cleaned.filter, &at, unknown);
                    prop_assert!(before || !after, "{} from {filter} at {at} with {unknown:b}", cleaned.filter);
                }
            }
        }
    }
}
