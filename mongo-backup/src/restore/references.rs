//! Finding the fields of a snapshot that refer to documents of other collections.

use std::collections::BTreeMap;

use mongo_core::{
    Error, Namespace, NamespaceSelection, Result,
    bson::{Bson, RawBson, RawBsonRef, RawDocument, spec::BinarySubtype},
    transfer::{catalog::CollectionKind, partition::Key},
    transform::Reference,
};

use super::{ids::IdRange, is_authorization};
use crate::repository::{Repository, SnapshotChoice, documents_of, manifest::SnapshotNamespace, segment::Content};

/// The values of a path that were seen.
type Samples = BTreeMap<String, Vec<RawBson>>;

impl Repository {
    /// Finds fields that seem to refer to documents: `ObjectId`s and UUIDs in them are, for the most part, `_id`s of one and the same collection.
    ///
    /// Only some documents of each collection are looked at, so it can miss a field and, where collections share `_id`s, take one for
    /// another: look at what it found, and declare the others. References by numbers and texts must be declared, as must those that are an `_id` or in one.
    ///
    /// # Errors
    /// `NotFound` for an unknown snapshot, `CorruptData` when it is damaged.
    pub async fn find_references(&self, snapshot: &SnapshotChoice, selection: &NamespaceSelection) -> Result<Vec<Reference>> {
        let manifest = self.snapshot(snapshot).await?;
        self.refresh_index().await?;
        let mut collections = self.namespaces(&manifest).await?;
        collections.retain(|collection| {
            let namespace = collection.namespace();
            collection.kind() == CollectionKind::Collection && selection.selects(namespace) && !is_authorization(namespace)
        });
        let mut found = Vec::new();
        for from in &collections {
            for (field, values) in self.samples(from).await? {
                let mut hits: Vec<(usize, &Namespace)> = Vec::new();
                for to in &collections {
                    let mut there = 0;
                    for value in &values {
                        there += usize::from(self.holds(to, value).await?);
                    }
                    hits.push((there, to.namespace()));
                }
                hits.sort_by_key(|(there, _)| std::cmp::Reverse(*there));
                if let [(most, to), rest @ ..] = hits.as_slice()
                    && *most * 2 >= values.len().max(1)
                    && rest.first().is_none_or(|(next, _)| next < most)
                {
                    found.push(Reference::new(from.namespace().clone(), field, (*to).clone()));
                }
            }
        }
        Ok(found)
    }

    /// Values that may be `_id`s, from the first documents of a collection.
    async fn samples(&self, collection: &SnapshotNamespace) -> Result<Samples> {
        let mut samples = Samples::new();
        let mut walk = self.walk(&collection.root)?;
        let mut looked_at = 0;
        while let Some(entry) = walk.next().await?
            && looked_at < DOCUMENTS_LOOKED_AT
        {
            for segment in self.read_segments(Content::Documents, &[entry.id]).await? {
                for document in documents_of(&segment) {
                    looked_at += 1;
                    for field in document? {
                        // A document that cannot be read refers to nothing here; it is restored all the same.
                        let Ok((name, value)) = field else { break };
                        if name.as_str() != "_id" {
                            collect(name.as_str().to_owned(), value, 0, &mut samples);
                        }
                    }
                }
            }
        }
        Ok(samples)
    }

    /// Whether a collection has a document of this `_id`.
    async fn holds(&self, collection: &SnapshotNamespace, id: &RawBson) -> Result<bool> {
        let id = Bson::try_from(id.clone()).map_err(|error| Error::corrupt("a document is malformed").with_source(error))?;
        let range = IdRange::one(id)?;
        let by_id = collection.in_id_order && matches!(collection.entry().options().get("collation"), Ok(None));
        if !by_id {
            return Ok(false);
        }
        let mut walk = self.walk_range(&collection.root, Some(&range))?;
        while let Some(entry) = walk.next().await? {
            for segment in self.read_segments(Content::Documents, &[entry.id]).await? {
                for document in documents_of(&segment) {
                    if range.contains(&Key::of(document?)?) {
                        return Ok(true);
                    }
                }
            }
        }
        Ok(false)
    }
}

fn collect(path: String, value: RawBsonRef<'_>, depth: u32, samples: &mut Samples) {
    let is_id = match &value {
        RawBsonRef::ObjectId(_) => true,
        RawBsonRef::Binary(binary) => binary.subtype == BinarySubtype::Uuid,
        _ => false,
    };
    if is_id {
        let seen = samples.entry(path).or_default();
        if seen.len() < VALUES_A_FIELD {
            seen.push(value.into());
        }
        return;
    }
    if depth > DEEPEST {
        return;
    }
    match value {
        RawBsonRef::Document(document) => within(&path, document, depth, samples),
        RawBsonRef::Array(array) => {
            array.into_iter().map_while(Result::ok).for_each(|element| collect(path.clone(), element, depth + 1, samples));
        }
        _ => {}
    }
}

fn within(path: &str, document: &RawDocument, depth: u32, samples: &mut Samples) {
    for (name, value) in document.into_iter().map_while(Result::ok) {
        collect(format!("{path}.{}", name.as_str()), value, depth + 1, samples);
    }
}

const DOCUMENTS_LOOKED_AT: usize = 500;
const VALUES_A_FIELD: usize = 8;
const DEEPEST: u32 = 20;
