//! New `_id`s, with references that still hold.

use std::fmt;

use bson::RawDocument;

use super::{
    Transform, Transformed,
    paths::{Rewrite, hash, path_of, rewrite},
};
use crate::{
    error::{Error, Result},
    namespace::Namespace,
    redact::Secret,
    transfer::raw::{ARRAY, Element, Writer, elements},
};

/// A field that holds the `_id`s of documents of a collection.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct Reference {
    /// The collection whose documents have the field.
    pub from: Namespace,
    /// The field, or a path to it, through documents and arrays.
    pub field: String,
    /// The collection whose `_id`s it holds.
    pub to: Namespace,
}

impl Reference {
    /// A reference.
    pub fn new(from: Namespace, field: impl Into<String>, to: Namespace) -> Self {
        Self { from, field: field.into(), to }
    }
}

/// Gives documents new `_id`s, and fields that refer to documents the new `_id`s of those.
///
/// So a copy can stand beside its original in the same collections. A new `_id` is a keyed hash of the collection and the old one: nothing is kept of
/// what became of which, and with the same secret the same `_id`s come out. An `ObjectId` becomes another one, a UUID another one, a number a whole
/// number, anything else a text of 32 hexadecimal digits. A reference to a document that is not there refers to none afterwards either.
///
/// ```
/// use mongo_core::transform::{NewIds, Reference, Transform, Transformed};
/// use mongo_core::{Namespace, bson::{oid::ObjectId, rawdoc}};
///
/// let (orders, customers): (Namespace, Namespace) = ("shop.orders".parse()?, "shop.customers".parse()?);
/// let new_ids = NewIds::new("any secret").with(Reference::new(orders.clone(), "customer", customers.clone()))?;
/// let id = ObjectId::new();
/// let Transformed::Replace(customer) = new_ids.apply(&customers, &rawdoc! { "_id": id })? else { panic!() };
/// let Transformed::Replace(order) = new_ids.apply(&orders, &rawdoc! { "_id": 1, "customer": id })? else { panic!() };
/// assert_ne!(customer.get_object_id("_id").unwrap(), id);
/// assert_eq!(order.get_object_id("customer").unwrap(), customer.get_object_id("_id").unwrap());
/// # Ok::<_, mongo_core::Error>(())
/// ```
pub struct NewIds {
    key: Secret<[u8; 32]>,
    references: Vec<(Reference, Vec<Vec<u8>>)>,
}

impl fmt::Debug for NewIds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NewIds").field("references", &self.references.len()).finish_non_exhaustive()
    }
}

impl NewIds {
    /// New `_id`s for all documents; no field refers to others yet.
    pub fn new(secret: impl AsRef<[u8]>) -> Self {
        Self { key: Secret::new(blake3::derive_key(CONTEXT, secret.as_ref())), references: Vec::new() }
    }

    /// Says that a field refers to documents.
    ///
    /// # Errors
    /// `InvalidInput` for an empty path, and for the `_id` itself.
    pub fn with(mut self, reference: Reference) -> Result<Self> {
        let path = path_of(&reference.field)?;
        if path.len() == 1 && path.first().is_some_and(|name| name == b"_id") {
            return Err(Error::invalid("an _id that refers to another document cannot be made anew: leave that collection out")
                .with_context("collection", &reference.from));
        }
        self.references.push((reference, path));
        Ok(self)
    }

    fn rename(&self, to: &mut Writer, value: Element<'_>, of: &Namespace) -> Result<()> {
        let Some(array) = value.as_array() else {
            hash(self.key.expose(), of.to_string().as_bytes(), to, value);
            return Ok(());
        };
        let mut renamed = Writer::new(array.as_bytes().len());
        for element in elements(array) {
            hash(self.key.expose(), of.to_string().as_bytes(), &mut renamed, element?);
        }
        to.append(ARRAY, value.name, &renamed.finish()?);
        Ok(())
    }
}

impl Transform for NewIds {
    fn apply(&self, namespace: &Namespace, document: &RawDocument) -> Result<Transformed> {
        let own = [b"_id".to_vec()];
        let mut rules: Vec<Rewrite<'_, &Namespace>> = vec![(&own, namespace)];
        let of_this = self.references.iter().filter(|(reference, _)| reference.from == *namespace);
        rules.extend(of_this.map(|(reference, path)| (&path[..], &reference.to)));
        rewrite(document, &rules, &mut |to, value, of| self.rename(to, value, of)).map(Transformed::Replace)
    }

    fn changes_ids(&self, _: &Namespace) -> bool {
        true
    }
}

const CONTEXT: &str = "mongo-core 2026-11 new _id key";

#[cfg(test)]
mod tests {
    use bson::{Bson, RawBson, RawDocumentBuf, oid::ObjectId, rawdoc};

    use super::*;
    use crate::transform::conformance;

    fn apply(new_ids: &NewIds, namespace: &str, document: &RawDocument) -> RawDocumentBuf {
        match new_ids.apply(&namespace.parse().unwrap(), document).unwrap() {
            Transformed::Replace(document) => document,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn references_hold_wherever_they_stand_and_whatever_their_type() {
        let reference = |field: &str| Reference::new("a.b".parse().unwrap(), field, "a.c".parse().unwrap());
        let new_ids = NewIds::new("secret").with(reference("one")).unwrap().with(reference("many.id")).unwrap();
        for id in
            [Bson::ObjectId(ObjectId::new()), Bson::Int32(5), Bson::String("x".to_owned()), Bson::Document(bson::doc! { "k": 1 })]
        {
            let id = RawBson::try_from(id).unwrap();
            let referred: RawBson = apply(&new_ids, "a.c", &rawdoc! { "_id": id.clone() }).get("_id").unwrap().unwrap().into();
            assert_ne!(referred, id);
            let referring =
                rawdoc! { "_id": 1, "one": id.clone(), "many": [{ "id": id.clone() }, { "id": [id.clone(), RawBson::Null] }, 7] };
            let changed = apply(&new_ids, "a.b", &referring);
            assert_eq!(RawBson::from(changed.get("one").unwrap().unwrap()), referred);
            let expected = rawdoc! { "many": [{ "id": referred.clone() }, { "id": [referred, RawBson::Null] }, 7] };
            assert_eq!(changed.get_array("many").unwrap().as_bytes(), expected.get_array("many").unwrap().as_bytes());
            conformance::check(&new_ids, &"a.b".parse().unwrap(), &[referring]).unwrap();
        }
    }

    #[test]
    fn collections_and_secrets_give_other_ids() {
        let id = |secret: &str, namespace: &str| apply(&NewIds::new(secret), namespace, &rawdoc! { "_id": 5 });
        assert_ne!(id("a", "x.y"), id("a", "x.z"));
        assert_ne!(id("a", "x.y"), id("b", "x.y"));
        assert_eq!(id("a", "x.y"), id("a", "x.y"));
    }
}
