//! Ready-made transforms that take out of documents what not everybody may see.

use std::fmt;

use bson::RawDocument;

use super::{
    Transform, Transformed,
    paths::{DEEPEST, Rewrite, hash, path_of, rewrite, text},
};
use crate::{
    error::{Error, Result},
    namespace::{Namespace, NamespacePattern},
    redact::Secret,
    transfer::raw::{self, BOOLEAN, DATE, DECIMAL, DOUBLE, Element, INT32, INT64, NULL, OBJECT_ID, STRING, TIMESTAMP, Writer},
};

/// What becomes of a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum Redaction {
    /// It is left out.
    Drop,
    /// A value of the same type that tells nothing stands in its place: a text becomes `***`, a number 0, a date the first of 1970, and so on;
    /// what has no such value becomes null. Documents and arrays keep their form.
    Mask,
    /// A keyed hash stands in its place, the same for the same value wherever it occurs: joins, groups and unique indexes still work. A text becomes 32
    /// hexadecimal digits, an `ObjectId` another one, a whole or other number a whole one; any other value becomes a text. Documents and arrays keep their form.
    ///
    /// Whoever has the key can test guesses, and without it rare values can still be told from frequent ones.
    Hash,
}

/// Redacts fields of documents.
///
/// ```
/// use mongo_core::transform::{Redaction, Redactions, Transform, Transformed};
/// use mongo_core::{Namespace, bson::rawdoc};
///
/// let redactions = Redactions::new("a secret of the host's")
///     .rule("shop.customers", "email", Redaction::Hash)?
///     .rule("shop.*", "card.number", Redaction::Mask)?;
/// let namespace: Namespace = "shop.customers".parse()?;
/// let document = rawdoc! { "_id": 1, "email": "a@b.example", "card": { "number": "4111" } };
/// let Transformed::Replace(redacted) = redactions.apply(&namespace, &document)? else { panic!() };
/// assert_eq!(redacted.get_document("card").unwrap().get_str("number").unwrap(), "***");
/// assert_ne!(redacted.get_str("email").unwrap(), "a@b.example");
/// # Ok::<_, mongo_core::Error>(())
/// ```
pub struct Redactions {
    key: Secret<[u8; 32]>,
    rules: Vec<Rule>,
}

struct Rule {
    namespaces: NamespacePattern,
    path: Vec<Vec<u8>>,
    redaction: Redaction,
}

impl fmt::Debug for Redactions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Redactions").field("rules", &self.rules.len()).finish_non_exhaustive()
    }
}

impl Redactions {
    /// No rule yet. The secret makes the hashes: with another one they are others.
    pub fn new(secret: impl AsRef<[u8]>) -> Self {
        Self { key: Secret::new(blake3::derive_key(CONTEXT, secret.as_ref())), rules: Vec::new() }
    }

    /// Redacts a field in the namespaces that match a pattern, as `shop.*`. The field may be a path, as `card.number`, and goes through
    /// arrays. Of several rules that meet a field the first counts.
    ///
    /// # Errors
    /// `InvalidInput` for a bad pattern, an empty path, and for an `_id` that would be left out or masked.
    pub fn rule(mut self, namespaces: &str, field: &str, redaction: Redaction) -> Result<Self> {
        let path = path_of(field)?;
        if path.first().is_some_and(|name| name == b"_id") && redaction != Redaction::Hash {
            return Err(Error::invalid("documents need an _id of their own: it can be hashed, but not be left out or masked"));
        }
        self.rules.push(Rule { namespaces: namespaces.parse()?, path, redaction });
        Ok(self)
    }

    fn redact_value(&self, to: &mut Writer, value: Element<'_>, redaction: Redaction, depth: u32) -> Result<()> {
        if depth > DEEPEST {
            return Err(Error::corrupt("a document is nested deeper than any server allows"));
        }
        if let Some(inner) = value.as_document().or_else(|| value.as_array()) {
            let mut redacted = Writer::new(inner.as_bytes().len());
            for field in raw::elements(inner) {
                self.redact_value(&mut redacted, field?, redaction, depth + 1)?;
            }
            to.append(value.kind, value.name, &redacted.finish()?);
            return Ok(());
        }
        match redaction {
            Redaction::Hash => hash(self.key.expose(), b"", to, value),
            Redaction::Mask => mask(to, value),
            Redaction::Drop => {}
        }
        Ok(())
    }
}

fn mask(to: &mut Writer, value: Element<'_>) {
    match value.kind {
        STRING => to.append(STRING, value.name, &text("***")),
        INT32 | INT64 | DOUBLE | DATE | TIMESTAMP | OBJECT_ID | BOOLEAN => {
            to.append(value.kind, value.name, &vec![0; value.value.len()])
        }
        DECIMAL => to.append(INT32, value.name, &[0; 4]),
        _ => to.append(NULL, value.name, &[]),
    }
}

impl Transform for Redactions {
    fn apply(&self, namespace: &Namespace, document: &RawDocument) -> Result<Transformed> {
        let name = namespace.to_string();
        let rules = self.rules.iter().filter(|rule| rule.namespaces.matches(&name));
        let rules: Vec<Rewrite<'_, Redaction>> = rules.map(|rule| (&rule.path[..], rule.redaction)).collect();
        if rules.is_empty() {
            return Ok(Transformed::Keep);
        }
        let redacted = rewrite(document, &rules, &mut |to, value, redaction| match redaction {
            Redaction::Drop => Ok(()),
            _ => self.redact_value(to, value, redaction, 0),
        })?;
        Ok(Transformed::Replace(redacted))
    }

    fn changes_ids(&self, namespace: &Namespace) -> bool {
        let name = namespace.to_string();
        self.rules.iter().any(|rule| rule.path.first().is_some_and(|first| first == b"_id") && rule.namespaces.matches(&name))
    }
}

const CONTEXT: &str = "mongo-core 2026-11 redaction key";

#[cfg(test)]
mod tests {
    use bson::{Bson, DateTime, RawBson, RawDocumentBuf, oid::ObjectId, rawdoc};
    use proptest::prelude::*;

    use super::*;
    use crate::transform::conformance;

    fn namespace() -> Namespace {
        "shop.customers".parse().unwrap()
    }

    fn redact(redactions: &Redactions, document: &RawDocument) -> RawDocumentBuf {
        match redactions.apply(&namespace(), document).unwrap() {
            Transformed::Replace(document) => document,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn fields_are_dropped_masked_and_hashed_at_any_depth_and_in_arrays() {
        let redactions = Redactions::new("key")
            .rule("shop.*", "password", Redaction::Drop)
            .and_then(|rules| rules.rule("shop.customers", "cards.number", Redaction::Mask))
            .and_then(|rules| rules.rule("*", "friend", Redaction::Hash))
            .and_then(|rules| rules.rule("other.*", "name", Redaction::Drop))
            .unwrap();
        let id = ObjectId::new();
        let document = rawdoc! { "_id": 1, "name": "kept", "password": "x", "friend": [id, "a", 7],
        "cards": [{ "number": "4111", "kind": "debit" }, { "number": 5 }, "odd"] };
        let redacted = redact(&redactions, &document);
        assert!(redacted.get("password").unwrap().is_none());
        assert_eq!(redacted.get_str("name").unwrap(), "kept");
        let cards = rawdoc! { "cards": [{ "number": "***", "kind": "debit" }, { "number": 0 }, "odd"] };
        assert_eq!(redacted.get_array("cards").unwrap().as_bytes(), cards.get_array("cards").unwrap().as_bytes());
        let friends: Vec<RawBson> =
            redacted.get_array("friend").unwrap().into_iter().map(|friend| friend.unwrap().into()).collect();
        assert!(
            matches!(&friends[..], [RawBson::ObjectId(other), RawBson::String(text), RawBson::Int64(_)] if *other != id && text.len() == 32)
        );
        conformance::check(&redactions, &namespace(), &[document]).unwrap();
    }

    #[test]
    fn equal_values_stay_equal_and_another_key_gives_others() {
        let rules =
            |key: &str| Redactions::new(key).rule("*", "a", Redaction::Hash).unwrap().rule("*", "_id", Redaction::Hash).unwrap();
        let hash = |key: &str, value: Bson| {
            let document = rawdoc! { "_id": RawBson::try_from(value.clone()).unwrap(), "a": RawBson::try_from(value).unwrap() };
            let redacted = redact(&rules(key), &document);
            let (id, field): (RawBson, RawBson) =
                (redacted.get("_id").unwrap().unwrap().into(), redacted.get("a").unwrap().unwrap().into());
            assert_eq!(id, field, "a reference still finds what it refers to");
            field
        };
        assert_eq!(hash("key", Bson::Int32(5)), hash("key", Bson::Double(5.0)));
        assert_ne!(hash("key", Bson::Int32(5)), hash("other", Bson::Int32(5)));
        assert_eq!(hash("key", Bson::Double(-0.0)), hash("key", Bson::Int64(0)));
        let large = 1_i64 << 60;
        assert_ne!(hash("key", Bson::Int64(large)), hash("key", Bson::Int64(large + 1)), "one double is nearest to both");
        assert_eq!(hash("key", Bson::Int64(large)), hash("key", Bson::Double(1_152_921_504_606_846_976.0)));
        assert_eq!(hash("key", Bson::Decimal128("1.50".parse().unwrap())), hash("key", Bson::Double(1.5)));
        assert_ne!(hash("key", Bson::String("5".to_owned())), hash("key", Bson::Int32(5)));
        assert_eq!(hash("key", Bson::Null), RawBson::Null);
        assert!(matches!(hash("key", Bson::DateTime(DateTime::now())), RawBson::String(_)));
        assert!(rules("key").changes_ids(&namespace()));
    }

    #[test]
    fn rules_that_make_no_sense_are_refused() {
        for (field, redaction) in
            [("", Redaction::Drop), ("a..b", Redaction::Mask), ("_id", Redaction::Drop), ("_id.x", Redaction::Mask)]
        {
            assert!(Redactions::new("key").rule("*", field, redaction).is_err(), "{field}");
        }
    }

    proptest! {
        #[test]
        fn no_changed_byte_is_a_panic(at in any::<prop::sample::Index>(), flip in 1..=255_u8) {
            let redactions = Redactions::new("key").rule("*", "a.b", Redaction::Hash).unwrap().rule("*", "c", Redaction::Mask).unwrap();
            let mut bytes = rawdoc! { "_id": 1, "a": [{ "b": [1, "x"] }], "c": { "d": 1.5 } }.into_bytes();
            let at = at.index(bytes.len() - 5) + 4;
            bytes[at] ^= flip;
            if let Ok(document) = RawDocument::from_bytes(&bytes) {
                let _ = redactions.apply(&namespace(), document);
            }
        }
    }
}
