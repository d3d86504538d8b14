//! What commands of the oplog make of the definition of one collection.

use mongo_core::{
    Error, Result,
    bson::{RawBsonRef, RawDocument, RawDocumentBuf, cstr, rawdoc},
    transfer::without,
};

/// A collection that is followed through the oplog.
#[derive(Clone, Debug)]
pub(super) struct Followed {
    /// `database.collection` as the oplog has it; of a time-series collection that of its buckets.
    pub(super) name: String,
    /// As `listCollections` tells them.
    pub(super) options: RawDocumentBuf,
    /// As `listIndexes` tells them.
    pub(super) indexes: Vec<RawDocumentBuf>,
    /// Its place in the snapshot; none if it was made since.
    pub(super) in_snapshot: Option<usize>,
    /// Whether it came, by a rename, from outside what the snapshot holds: then its documents are not known.
    pub(super) is_foreign: bool,
}

impl Followed {
    /// From a `create`.
    pub(super) fn created(name: String, command: &RawDocument) -> Result<Self> {
        let indexes = match command.get_document("idIndex") {
            Ok(index) => vec![index.to_owned()],
            // A clustered collection has none.
            Err(_) => Vec::new(),
        };
        let options = without(command, &["create", "idIndex"])?;
        Ok(Self { name, options, indexes, in_snapshot: None, is_foreign: false })
    }

    /// The name of the time-series collection whose buckets these are.
    pub(super) fn time_series(&self) -> Option<(&str, &str)> {
        let (database, collection) = self.name.split_once('.')?;
        Some((database, collection.strip_prefix(BUCKETS)?))
    }

    /// A collection that was made for a while is an ordinary one when it gets its name.
    pub(super) fn rename(&mut self, name: String) -> Result<()> {
        self.name = name;
        self.options = without(&self.options, &["temp"])?;
        Ok(())
    }

    pub(super) fn add_index(&mut self, definition: &RawDocument) -> Result<()> {
        let definition = self.as_listed(definition)?;
        let name = name_of(&definition).to_owned();
        self.indexes.retain(|index| name_of(index) != name);
        self.indexes.push(definition);
        Ok(())
    }

    pub(super) fn drop_indexes(&mut self, command: &RawDocument) -> Result<()> {
        match command.get("index")? {
            Some(RawBsonRef::String("*")) => self.indexes.retain(|index| name_of(index) == "_id_"),
            Some(RawBsonRef::String(name)) => self.indexes.retain(|index| name_of(index) != name),
            Some(RawBsonRef::Document(key)) => {
                self.indexes.retain(|index| !has_key(index, key));
            }
            _ => return Err(Error::corrupt("the oplog drops an index without a name")),
        }
        Ok(())
    }

    pub(super) fn modify(&mut self, command: &RawDocument) -> Result<()> {
        for field in command {
            let (name, value) = field?;
            match (name.as_str(), value) {
                ("collMod" | "noPadding" | "usePowerOf2Sizes", _) => {}
                ("index", RawBsonRef::Document(change)) => self.modify_index(change)?,
                ("expireAfterSeconds", RawBsonRef::String("off")) => {
                    self.options = without(&self.options, &["expireAfterSeconds"])?;
                }
                ("timeseries", RawBsonRef::Document(change)) => self.modify_time_series(change)?,
                ("cappedSize", size) => self.set(cstr!("size"), size)?,
                ("cappedMax", max) => self.set(cstr!("max"), max)?,
                (_, value) => self.set(name, value)?,
            }
        }
        let has_validator = |options: &RawDocument| matches!(options.get("validator"), Ok(Some(_)));
        if has_validator(&self.options) {
            // The server's own defaults, which it writes down with the first validator.
            for (name, value) in [(cstr!("validationLevel"), "strict"), (cstr!("validationAction"), "error")] {
                if self.options.get(name)?.is_none() {
                    self.options.append(name, value);
                }
            }
        }
        Ok(())
    }

    fn set(&mut self, name: &mongo_core::bson::raw::CStr, value: RawBsonRef<'_>) -> Result<()> {
        self.options = with(&self.options, name, value)?;
        Ok(())
    }

    fn modify_index(&mut self, change: &RawDocument) -> Result<()> {
        let by_name = change.get_str("name").ok();
        let by_key = change.get_document("keyPattern").ok();
        let is_meant = |index: &RawDocumentBuf| {
            by_name.is_some_and(|name| name_of(index) == name) || by_key.is_some_and(|key| has_key(index, key))
        };
        let Some(index) = self.indexes.iter_mut().find(|index| is_meant(index)) else { return Ok(()) };
        for field in change {
            let (name, value) = field?;
            *index = match (name.as_str(), value) {
                ("name" | "keyPattern", _) => continue,
                ("hidden" | "prepareUnique", RawBsonRef::Boolean(false)) => without(index, &[name.as_str()])?,
                ("unique", RawBsonRef::Boolean(true)) => with(&without(index, &["prepareUnique"])?, name, value)?,
                ("forceNonUnique", RawBsonRef::Boolean(true)) => without(index, &["unique"])?,
                _ => with(index, name, value)?,
            };
        }
        Ok(())
    }

    fn modify_time_series(&mut self, change: &RawDocument) -> Result<()> {
        let Ok(before) = self.options.get_document("timeseries") else { return Ok(()) };
        let mut after = before.to_owned();
        for field in change {
            let (name, value) = field?;
            after = with(&after, name, value)?;
        }
        // What a granularity comes to, where the server does not spell it out (`timeseries_options` of the server).
        let seconds = match change.get_str("granularity") {
            Ok("seconds") => Some(3600),
            Ok("minutes") => Some(86_400),
            Ok("hours") => Some(2_592_000),
            _ => None,
        };
        if let (Some(seconds), None) = (seconds, change.get("bucketMaxSpanSeconds")?) {
            after = with(&after, cstr!("bucketMaxSpanSeconds"), RawBsonRef::Int32(seconds))?;
        }
        self.options = with(&self.options, cstr!("timeseries"), RawBsonRef::Document(&after))?;
        Ok(())
    }

    /// An index of buckets as one of measurements, which is how it is listed and made; any other as it is.
    fn as_listed(&self, definition: &RawDocument) -> Result<RawDocumentBuf> {
        let Ok(time_series) = self.options.get_document("timeseries") else { return Ok(definition.to_owned()) };
        if self.time_series().is_none() {
            return Ok(definition.to_owned());
        }
        if let Ok(original) = definition.get_document("originalSpec") {
            return Ok(original.to_owned());
        }
        let time_field = time_series.get_str("timeField").unwrap_or_default();
        let meta_field = time_series.get_str("metaField").unwrap_or_default();
        let mut key = RawDocumentBuf::new();
        for field in definition.get_document("key").map_err(|error| Error::corrupt("an index has no key").with_source(error))? {
            let (name, value) = field?;
            let name = name.as_str();
            let descends = matches!(value, RawBsonRef::Int32(-1) | RawBsonRef::Int64(-1)) || value.as_f64() == Some(-1.0);
            // A measured field stands for its least and its greatest value; of those that comes first which comes first in order.
            let measured = match (name.strip_prefix("control.min."), name.strip_prefix("control.max."), descends) {
                (Some(field), _, false) | (_, Some(field), true) => Some(field),
                (Some(_), ..) | (_, Some(_), _) => continue,
                _ => name.strip_prefix("data."),
            };
            let listed = match (measured, name.strip_prefix("meta")) {
                (Some(field), _) if name == format!("control.min.{time_field}") || field == time_field => time_field.to_owned(),
                (Some(field), _) => field.to_owned(),
                (None, Some(rest)) if rest.is_empty() || rest.starts_with('.') => format!("{meta_field}{rest}"),
                _ => name.to_owned(),
            };
            let listed = mongo_core::bson::raw::CString::try_from(listed)?;
            match value {
                RawBsonRef::String("2dsphere_bucket") => key.append(listed, "2dsphere"),
                value => key.append(listed, value),
            }
        }
        with(definition, cstr!("key"), RawBsonRef::Document(&key))
    }
}

/// A document in which a field has a value, in its place or at the end.
fn with(document: &RawDocument, name: &mongo_core::bson::raw::CStr, value: RawBsonRef<'_>) -> Result<RawDocumentBuf> {
    let mut copy = RawDocumentBuf::new();
    let mut found = false;
    for field in document {
        let (field, old) = field?;
        if field == name {
            found = true;
            copy.append(field, value);
        } else {
            copy.append(field, old);
        }
    }
    if !found {
        copy.append(name, value);
    }
    Ok(copy)
}

fn has_key(index: &RawDocument, key: &RawDocument) -> bool {
    index.get_document("key").is_ok_and(|other| other.as_bytes() == key.as_bytes())
}

fn name_of(index: &RawDocument) -> &str {
    index.get_str("name").unwrap_or_default()
}

/// The listing of a collection.
pub(super) fn listing(name: &str, kind: &str, options: &RawDocument) -> RawDocumentBuf {
    rawdoc! { "name": name, "type": kind, "options": options.to_owned() }
}

pub(super) const BUCKETS: &str = "system.buckets.";

#[cfg(test)]
mod tests {
    use super::*;

    fn followed() -> Followed {
        let create =
            rawdoc! { "create": "c", "capped": true, "size": 4096, "idIndex": { "v": 2, "key": { "_id": 1 }, "name": "_id_" } };
        Followed::created("db.c".to_owned(), &create).unwrap()
    }

    #[test]
    fn indexes_come_change_and_go() {
        let mut collection = followed();
        collection.add_index(&rawdoc! { "v": 2, "key": { "a": 1 }, "name": "a_1", "expireAfterSeconds": 5 }).unwrap();
        collection.add_index(&rawdoc! { "v": 2, "key": { "b": 1 }, "name": "b_1" }).unwrap();
        let modify = rawdoc! { "collMod": "c", "index": { "name": "a_1", "expireAfterSeconds": 9_i64, "hidden": true } };
        collection.modify(&modify).unwrap();
        collection.modify(&rawdoc! { "collMod": "c", "index": { "name": "b_1", "prepareUnique": true } }).unwrap();
        collection.modify(&rawdoc! { "collMod": "c", "index": { "keyPattern": { "b": 1 }, "unique": true } }).unwrap();
        let expected = [
            rawdoc! { "v": 2, "key": { "_id": 1 }, "name": "_id_" },
            rawdoc! { "v": 2, "key": { "a": 1 }, "name": "a_1", "expireAfterSeconds": 9_i64, "hidden": true },
            rawdoc! { "v": 2, "key": { "b": 1 }, "name": "b_1", "unique": true },
        ];
        assert_eq!(collection.indexes, expected);
        collection.modify(&rawdoc! { "collMod": "c", "index": { "name": "a_1", "hidden": false } }).unwrap();
        collection.drop_indexes(&rawdoc! { "dropIndexes": "c", "index": "b_1" }).unwrap();
        assert_eq!(collection.indexes.len(), 2);
        assert!(collection.indexes[1].get("hidden").unwrap().is_none());
        collection.drop_indexes(&rawdoc! { "dropIndexes": "c", "index": "*" }).unwrap();
        assert_eq!(collection.indexes, expected[..1]);
    }

    #[test]
    fn options_change_in_their_place() {
        let mut collection = followed();
        collection.modify(&rawdoc! { "collMod": "c", "cappedSize": 8192_i64, "validator": { "a": 1 } }).unwrap();
        let expected = rawdoc! { "capped": true, "size": 8192_i64, "validator": { "a": 1 }, "validationLevel": "strict",
        "validationAction": "error" };
        assert_eq!(collection.options, expected);
    }

    #[test]
    fn an_index_of_buckets_is_listed_as_one_of_measurements() {
        let create = rawdoc! { "create": "system.buckets.ts", "timeseries": { "timeField": "t", "metaField": "m" }, "clusteredIndex": true };
        let mut buckets = Followed::created("db.system.buckets.ts".to_owned(), &create).unwrap();
        assert_eq!(buckets.time_series(), Some(("db", "ts")));
        let key =
            rawdoc! { "meta": 1, "meta.x": -1, "control.min.t": 1, "control.max.t": 1, "control.max.v": -1, "control.min.v": -1 };
        buckets.add_index(&rawdoc! { "v": 2, "key": key, "name": "i" }).unwrap();
        let expected = rawdoc! { "m": 1, "m.x": -1, "t": 1, "v": -1 };
        assert_eq!(buckets.indexes[0].get_document("key").unwrap(), &*expected);
        buckets.modify(&rawdoc! { "collMod": "system.buckets.ts", "timeseries": { "granularity": "minutes" } }).unwrap();
        let options = buckets.options.get_document("timeseries").unwrap();
        assert_eq!(options.get_i32("bucketMaxSpanSeconds").unwrap(), 86_400);
    }
}
