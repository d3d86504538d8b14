//! Names of collections, patterns that choose some of them, and rules that rename them.

use std::{fmt, str::FromStr};

use crate::{
    error::{Error, Result},
    pattern::TextPattern,
};

/// A database and a collection in it, as in `shop.orders`.
///
/// ```
/// use mongo_core::Namespace;
///
/// let namespace: Namespace = "shop.orders.2024".parse()?;
/// assert_eq!((namespace.database(), namespace.collection()), ("shop", "orders.2024"));
/// # Ok::<(), mongo_core::Error>(())
/// ```
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(try_from = "String", into = "String"))]
pub struct Namespace {
    database: String,
    collection: String,
}

impl Namespace {
    /// A namespace from its two parts.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](crate::ErrorKind::InvalidInput) when a part is empty or holds what the server refuses in a name.
    pub fn new(database: impl Into<String>, collection: impl Into<String>) -> Result<Self> {
        let (database, collection) = (database.into(), collection.into());
        if database.is_empty() || database.len() > 63 || database.contains(['/', '\\', '.', ' ', '"', '$', '\0']) {
            return Err(Error::invalid("this is no database name").with_context("database", &database));
        }
        if collection.is_empty() || collection.contains('\0') {
            return Err(Error::invalid("this is no collection name").with_context("collection", &collection));
        }
        Ok(Self { database, collection })
    }

    /// The database.
    pub fn database(&self) -> &str {
        &self.database
    }

    /// The collection.
    pub fn collection(&self) -> &str {
        &self.collection
    }

    /// The same database with another collection.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn sibling(&self, collection: impl Into<String>) -> Result<Self> {
        Self::new(self.database.clone(), collection)
    }
}

impl fmt::Display for Namespace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.database, self.collection)
    }
}

impl fmt::Debug for Namespace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Namespace {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let (database, collection) = text
            .split_once('.')
            .ok_or_else(|| Error::invalid("a namespace is written database.collection").with_context("got", text))?;
        Self::new(database, collection)
    }
}

impl TryFrom<String> for Namespace {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<Namespace> for String {
    fn from(namespace: Namespace) -> Self {
        namespace.to_string()
    }
}

/// A pattern over whole namespaces: `*` stands for any run of characters, `\*` for a star, `\\` for a backslash.
///
/// A pattern without a dot means a whole database: `shop` is `shop.*`. A single `*` means everything.
///
/// ```
/// use mongo_core::NamespacePattern;
///
/// let pattern: NamespacePattern = "shop.order*".parse()?;
/// assert!(pattern.matches("shop.orders.2024") && !pattern.matches("shop.users"));
/// # Ok::<(), mongo_core::Error>(())
/// ```
#[derive(Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(try_from = "String", into = "String"))]
pub struct NamespacePattern {
    text: String,
    pattern: TextPattern,
}

impl NamespacePattern {
    /// Whether `namespace` (in the form `database.collection`) matches.
    pub fn matches(&self, namespace: &str) -> bool {
        self.pattern.matches(namespace)
    }

    /// Whether a collection of this database may match, whatever it is called.
    pub fn may_match_in(&self, database: &str) -> bool {
        self.pattern.may_begin(&format!("{database}."))
    }

    /// Whether every collection of this database matches, whatever it is called.
    pub fn matches_all_of(&self, database: &str) -> bool {
        self.pattern.matches_whatever_follows(&format!("{database}."))
    }

    fn stars(&self) -> usize {
        self.pattern.stars()
    }
}

impl FromStr for NamespacePattern {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        if text.is_empty() {
            return Err(Error::invalid(
                "a namespace pattern is empty: write database.collection, with * for any run of characters",
            ));
        }
        let mut pattern = TextPattern::new(text);
        if text != "*" && !pattern.has_literal('.') {
            pattern = TextPattern::new(&format!("{text}.*"));
        }
        Ok(Self { text: text.to_owned(), pattern })
    }
}

impl fmt::Display for NamespacePattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for NamespacePattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.text, f)
    }
}

impl TryFrom<String> for NamespacePattern {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<NamespacePattern> for String {
    fn from(pattern: NamespacePattern) -> Self {
        pattern.text
    }
}

/// Which namespaces an operation is about: those that match an include (or all, when there is none) and no exclude.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(default))]
#[non_exhaustive]
pub struct NamespaceSelection {
    /// Patterns to take; empty means everything.
    pub include: Vec<NamespacePattern>,
    /// Patterns to leave out of that.
    pub exclude: Vec<NamespacePattern>,
}

/// As `everything`, or `shop.* but not shop.cache`.
impl fmt::Display for NamespaceSelection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |patterns: &[NamespacePattern]| patterns.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        f.write_str(&if self.include.is_empty() { "everything".to_owned() } else { list(&self.include) })?;
        if self.exclude.is_empty() { Ok(()) } else { write!(f, " but not {}", list(&self.exclude)) }
    }
}

impl NamespaceSelection {
    /// Everything.
    pub fn all() -> Self {
        Self::default()
    }

    /// Adds a pattern to take.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](crate::ErrorKind::InvalidInput) for an empty pattern.
    pub fn including(mut self, pattern: &str) -> Result<Self> {
        self.include.push(pattern.parse()?);
        Ok(self)
    }

    /// Adds a pattern to leave out.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](crate::ErrorKind::InvalidInput) for an empty pattern.
    pub fn excluding(mut self, pattern: &str) -> Result<Self> {
        self.exclude.push(pattern.parse()?);
        Ok(self)
    }

    /// Whether the namespace is chosen.
    pub fn selects(&self, namespace: &Namespace) -> bool {
        let text = namespace.to_string();
        (self.include.is_empty() || self.include.iter().any(|pattern| pattern.matches(&text)))
            && !self.exclude.iter().any(|pattern| pattern.matches(&text))
    }

    /// Whether it can take namespaces of databases that it does not name.
    pub fn is_open(&self) -> bool {
        self.include.is_empty() || self.include.iter().any(|pattern| !pattern.pattern.first().contains('.'))
    }

    /// The includes that none of `namespaces` matches: most often a misspelling.
    pub fn unmatched<'a>(&'a self, namespaces: impl Iterator<Item = &'a Namespace> + Clone) -> Vec<&'a NamespacePattern> {
        self.include
            .iter()
            .filter(|pattern| !namespaces.clone().any(|namespace| pattern.matches(&namespace.to_string())))
            .collect()
    }
}

/// Renames namespaces: in `shop.*=copy.*` what the star stands for is carried over.
///
/// The first rule that matches a namespace decides; others leave it as it is.
///
/// ```
/// use mongo_core::{Namespace, NamespaceRenames};
///
/// let renames = NamespaceRenames::default().renaming("shop.*", "shop_copy.*")?;
/// assert_eq!(renames.apply(&"shop.orders".parse()?)?.to_string(), "shop_copy.orders");
/// # Ok::<(), mongo_core::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(default))]
pub struct NamespaceRenames {
    rules: Vec<(NamespacePattern, NamespacePattern)>,
}

impl NamespaceRenames {
    /// Adds a rule. Without a dot, both sides mean whole databases.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](crate::ErrorKind::InvalidInput) when the two sides have different numbers of stars.
    pub fn renaming(mut self, from: &str, to: &str) -> Result<Self> {
        let (from, to): (NamespacePattern, NamespacePattern) = (from.parse()?, to.parse()?);
        if from.stars() != to.stars() {
            return Err(Error::invalid("a rename needs the same number of * on both sides")
                .with_context("from", from)
                .with_context("to", to));
        }
        self.rules.push((from, to));
        Ok(self)
    }

    /// Whether there is no rule.
    pub fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    /// The name after renaming.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](crate::ErrorKind::InvalidInput) when the result is no valid namespace.
    pub fn apply(&self, namespace: &Namespace) -> Result<Namespace> {
        let text = namespace.to_string();
        let Some((captures, to)) = self.rules.iter().find_map(|(from, to)| Some((from.pattern.captures(&text)?, to))) else {
            return Ok(namespace.clone());
        };
        let mut renamed = String::new();
        for (position, literal) in to.pattern.literals().iter().enumerate() {
            renamed.push_str(literal);
            renamed.push_str(captures.get(position).copied().unwrap_or_default());
        }
        renamed.parse::<Namespace>().map_err(|error| error.with_context("renamed from", namespace))
    }

    /// The source patterns that none of `namespaces` matches.
    pub fn unmatched<'a>(&'a self, namespaces: impl Iterator<Item = &'a Namespace> + Clone) -> Vec<&'a NamespacePattern> {
        self.rules
            .iter()
            .map(|(from, _)| from)
            .filter(|pattern| !namespaces.clone().any(|namespace| pattern.matches(&namespace.to_string())))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn matches(pattern: &str, namespace: &str) -> bool {
        pattern.parse::<NamespacePattern>().unwrap().matches(namespace)
    }

    #[test]
    fn patterns_match_whole_namespaces() {
        assert!(matches("*", "a.b"));
        assert!(matches("shop", "shop.a.b"));
        assert!(!matches("shop", "shop2.a"));
        assert!(matches("*.users", "x.users"));
        assert!(!matches("*.users", "x.users2"));
        assert!(matches("s*p.o*s", "shop.orders"));
        assert!(matches(r"odd.a\*b", "odd.a*b") && !matches(r"odd.a\*b", "odd.axb"));
        assert!(matches(r"odd.back\slash", r"odd.back\slash"));
        assert!(!matches("a.b", "a.bc") && !matches("a.b", "xa.b"));
        assert!(matches("a.*x", "a.xx") && !matches("a.b*b", "a.b"));
    }

    #[test]
    fn renames_carry_stars_over() {
        let renames = NamespaceRenames::default().renaming("a.*_*", "b.*-*").unwrap().renaming("c", "d").unwrap();
        let apply = |name: &str| renames.apply(&name.parse().unwrap()).unwrap().to_string();
        assert_eq!(apply("a.x_y_z"), "b.x-y_z");
        assert_eq!(apply("c.any.thing"), "d.any.thing");
        assert_eq!(apply("e.f"), "e.f");
        assert!(NamespaceRenames::default().renaming("a.*", "b.c").is_err());
    }

    #[test]
    fn an_include_that_matches_nothing_is_found() {
        let selection = NamespaceSelection::all().including("shop.*").unwrap().including("typo.*").unwrap();
        let namespaces = ["shop.a".parse::<Namespace>().unwrap()];
        let unmatched: Vec<_> = selection.unmatched(namespaces.iter()).into_iter().map(ToString::to_string).collect();
        assert_eq!(unmatched, ["typo.*"]);
    }

    proptest! {
        #[test]
        fn an_escaped_name_matches_itself_only(name in "[a-z*\\\\.]{1,12}", other in "[a-z*\\\\.]{1,12}") {
            let pattern = format!("db.{}", name.replace('\\', r"\\").replace('*', r"\*"));
            let pattern: NamespacePattern = pattern.parse().unwrap();
            let (own, others) = (format!("db.{}", name), format!("db.{}", other));
            prop_assert!(pattern.matches(&own));
            prop_assert_eq!(pattern.matches(&others), name == other);
        }

        #[test]
        fn renaming_to_itself_changes_nothing(collection in "[a-z._]{1,12}") {
            let namespace = Namespace::new("db", collection).unwrap();
            let renames = NamespaceRenames::default().renaming("*_*", "*_*").unwrap();
            prop_assert_eq!(renames.apply(&namespace).unwrap(), namespace);
        }
    }
}
