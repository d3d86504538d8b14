//! The text that describes a collection: canonical extended JSON, in metadata files and in the prelude of archives.

use mongo_core::{
    Error, Namespace, Result,
    bson::{Binary, Bson, Document, RawDocumentBuf, doc, rawdoc, spec::BinarySubtype},
    transfer::catalog::{CollectionEntry, CollectionKind},
};

/// What is said of a collection.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Metadata {
    pub(super) options: Document,
    pub(super) indexes: Vec<Document>,
    pub(super) uuid: Option<[u8; 16]>,
    pub(super) collection: Option<String>,
    pub(super) kind: Option<String>,
}

impl Metadata {
    pub(super) fn of(entry: &CollectionEntry) -> Result<Self> {
        let readable = |error| Error::corrupt("a definition cannot be written as extended JSON").with_source(error);
        Ok(Self {
            options: Document::try_from(entry.options()).map_err(readable)?,
            indexes: entry
                .indexes()
                .iter()
                .map(|index| Document::try_from(&**index))
                .collect::<Result<_, _>>()
                .map_err(readable)?,
            uuid: entry.uuid(),
            collection: Some(entry.namespace().collection().to_owned()),
            kind: Some(
                match entry.kind() {
                    CollectionKind::View => "view",
                    CollectionKind::TimeSeries => "timeseries",
                    _ => "collection",
                }
                .to_owned(),
            ),
        })
    }

    /// The entry of a catalog.
    pub(super) fn entry(&self, namespace: Namespace) -> Result<CollectionEntry> {
        let kind = match self.kind.as_deref() {
            Some("view") => CollectionKind::View,
            Some("timeseries") => CollectionKind::TimeSeries,
            // Old versions do not tell.
            _ if self.options.contains_key("viewOn") => CollectionKind::View,
            _ if self.options.contains_key("timeseries") => CollectionKind::TimeSeries,
            _ => CollectionKind::Collection,
        };
        let name = match kind {
            CollectionKind::View => "view",
            CollectionKind::TimeSeries => "timeseries",
            _ => "collection",
        };
        let mut info = rawdoc! { "name": namespace.collection(), "type": name, "options": raw(&self.options)? };
        let mut about = rawdoc! { "readOnly": kind == CollectionKind::View };
        if let Some(uuid) = self.uuid {
            about.append(
                mongo_core::bson::cstr!("uuid"),
                mongo_core::bson::RawBson::Binary(Binary { subtype: BinarySubtype::Uuid, bytes: uuid.to_vec() }),
            );
        }
        info.append(mongo_core::bson::cstr!("info"), about);
        let indexes = self.indexes.iter().map(raw).collect::<Result<_>>()?;
        CollectionEntry::from_parts(namespace, kind, info, indexes)
    }

    pub(super) fn to_text(&self) -> String {
        let mut document = doc! {};
        if !self.options.is_empty() {
            document.insert("options", self.options.clone());
        }
        document.insert("indexes", self.indexes.clone());
        if let Some(uuid) = self.uuid {
            document.insert("uuid", hex::encode(uuid));
        }
        if let Some(collection) = &self.collection {
            document.insert("collectionName", collection.clone());
        }
        if let Some(kind) = &self.kind {
            document.insert("type", kind.clone());
        }
        Bson::Document(document).into_canonical_extjson().to_string()
    }

    /// # Errors
    /// `CorruptData` for text that is no metadata. An empty text is metadata that says nothing.
    pub(super) fn parse(text: &str) -> Result<Self> {
        if text.trim().is_empty() {
            return Ok(Self::default());
        }
        let malformed = |what: &'static str| Error::corrupt(what);
        let json: serde_json::Value =
            serde_json::from_str(text).map_err(|error| malformed("a collection's metadata is no JSON").with_source(error))?;
        let Bson::Document(mut document) =
            Bson::try_from(json).map_err(|error| malformed("a collection's metadata is no extended JSON").with_source(error))?
        else {
            return Err(malformed("a collection's metadata is no document"));
        };
        let mut metadata = Self::default();
        if let Some(Bson::Document(options)) = document.remove("options") {
            metadata.options = options;
        }
        if let Some(Bson::Array(indexes)) = document.remove("indexes") {
            for index in indexes {
                let Bson::Document(index) = index else { return Err(malformed("an index in the metadata is no document")) };
                metadata.indexes.push(index);
            }
        }
        if let Some(Bson::String(uuid)) = document.remove("uuid") {
            let mut bytes = [0; 16];
            hex::decode_to_slice(uuid, &mut bytes).map_err(|_| malformed("the UUID in the metadata is none"))?;
            metadata.uuid = Some(bytes);
        }
        let mut text = |key: &str| match document.remove(key) {
            Some(Bson::String(text)) if !text.is_empty() => Some(text),
            _ => None,
        };
        metadata.collection = text("collectionName");
        metadata.kind = text("type");
        Ok(metadata)
    }
}

fn raw(document: &Document) -> Result<RawDocumentBuf> {
    RawDocumentBuf::try_from(document).map_err(|error| Error::corrupt("a definition is no BSON").with_source(error))
}

#[cfg(test)]
mod tests {
    use mongo_core::bson::{DateTime, Decimal128, Regex, Timestamp, oid::ObjectId};

    use super::*;

    #[test]
    fn definitions_keep_order_and_types() {
        let info = rawdoc! { "name": "c", "type": "collection", "options": {
            "zeta": 1_i32, "alpha": 2_i64, "validator": { "b": { "$type": "int" }, "a": { "$gt": 1.5 } }, "collation": { "locale": "fr" },
        }, "info": { "readOnly": false } };
        let index = rawdoc! { "v": 2, "key": { "z": 1, "a": -1.0, "m": "2dsphere" }, "name": "z_1", "expireAfterSeconds": 5_i64 };
        let entry =
            CollectionEntry::from_parts("db.c".parse().unwrap(), CollectionKind::Collection, info, vec![index.clone()]).unwrap();
        let text = Metadata::of(&entry).unwrap().to_text();
        assert!(text.find("zeta").unwrap() < text.find("alpha").unwrap(), "{text}");
        let read = Metadata::parse(&text).unwrap().entry("db.c".parse().unwrap()).unwrap();
        assert_eq!(read.options(), entry.options());
        assert_eq!(read.indexes(), [index]);
    }

    #[test]
    fn values_of_every_type_come_back() {
        let options = doc! {
            "double": 1.0, "nan": f64::INFINITY, "int": 1, "long": i64::MAX, "null": Bson::Null, "date": DateTime::from_millis(-5),
            "decimal": "1.50".parse::<Decimal128>().unwrap(), "id": ObjectId::from_bytes([7; 12]), "time": Timestamp { time: 1, increment: 2 },
            "regex": Bson::RegularExpression(Regex { pattern: "a".try_into().unwrap(), options: "i".try_into().unwrap() }),
            "min": Bson::MinKey, "max": Bson::MaxKey, "array": [1, 2_i64], "text": "ü\"\\",
        };
        let metadata = Metadata { options, ..Metadata::default() };
        assert_eq!(Metadata::parse(&metadata.to_text()).unwrap(), metadata);
    }

    #[test]
    fn what_is_no_metadata_is_refused() {
        assert_eq!(Metadata::parse(" ").unwrap(), Metadata::default());
        for bad in ["[]", "{", "{\"indexes\":[1]}", "{\"uuid\":\"xyz\"}", "nonsense"] {
            assert!(Metadata::parse(bad).is_err(), "{bad}");
        }
    }
}
