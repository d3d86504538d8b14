//! The namespaces that a command reads or writes.
//!
//! What is named is found, wherever it is named: in the command itself, in the stages of a pipeline, in a bulk write. What stands behind a view
//! only the server knows.

use std::collections::BTreeSet;

use bson::{RawBsonRef, RawDocument};

use super::{Command, kind::Kind};

/// The namespaces that a command touches.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Touched {
    /// As `database.collection`.
    pub(crate) namespaces: BTreeSet<String>,
    /// Databases as a whole.
    pub(crate) databases: BTreeSet<String>,
    /// What is named first.
    pub(crate) first: String,
    /// Whatever there is.
    pub(crate) everything: bool,
}

/// The sequence, or the array, in which a bulk write names its namespaces.
pub(crate) const NAMESPACES_OF_BULK_WRITE: &str = "nsInfo";

impl Touched {
    /// Finds them. `of_bulk_write` are the documents of the sequence [`NAMESPACES_OF_BULK_WRITE`], if there was one.
    pub(crate) fn by(command: &Command<'_>, of_bulk_write: &[u8]) -> Self {
        let mut touched = Self::default();
        touched.command(command, of_bulk_write, 0);
        touched
    }

    fn command(&mut self, command: &Command<'_>, of_bulk_write: &[u8], depth: usize) {
        let database = command.database;
        match Kind::of(command.name) {
            Kind::OnCollection(_) => {
                match command.first {
                    RawBsonRef::String(name) => self.collection(database, name),
                    // By an identifier, or an aggregation of no collection.
                    _ => self.database(database),
                }
                self.fields(command.body, database);
            }
            Kind::GetMore | Kind::Connection => match command.collection() {
                Some(name) => self.collection(database, name),
                None => self.database(database),
            },
            Kind::Explain => match command.first {
                RawBsonRef::Document(inner) if depth == 0 => match Command::read(inner.as_bytes(), Some(database)) {
                    Ok(inner) if inner.database == database => self.command(&inner, &[], 1),
                    _ => self.everything = true,
                },
                _ => self.everything = true,
            },
            Kind::OnFullName(_) => {
                for key in [command.name, "to"] {
                    match command.body.get(key) {
                        Ok(Some(RawBsonRef::String(name))) => self.full_name(name),
                        Ok(None) => {}
                        _ => self.everything = true,
                    }
                }
            }
            Kind::OnDatabase(_) => {
                match command.name {
                    "bulkWrite" => return self.bulk_write(command.body, of_bulk_write),
                    // It names them in many ways.
                    "applyOps" | "doTxn" => self.everything = true,
                    _ => {}
                }
                self.database(database);
            }
        }
    }

    /// What else than its first value may name a namespace.
    fn fields(&mut self, body: &RawDocument, database: &str) {
        for field in body.iter_elements() {
            let Ok(field) = field else {
                self.everything = true;
                return;
            };
            match (field.key().as_str(), field.value()) {
                ("pipeline", Ok(stages)) => self.stages(stages, database),
                ("viewOn", Ok(RawBsonRef::String(name))) => self.collection(database, name),
                ("out", Ok(out)) => self.named(out, database, &["replace", "merge", "reduce"]),
                ("pipeline" | "viewOn" | "out", Err(_)) => self.everything = true,
                _ => {}
            }
        }
    }

    fn bulk_write(&mut self, body: &RawDocument, sequence: &[u8]) {
        let before = self.namespaces.len();
        if let Ok(Some(RawBsonRef::Array(all))) = body.get(NAMESPACES_OF_BULK_WRITE) {
            for one in all {
                self.of_bulk_write(one.ok().and_then(|one| one.as_document()));
            }
        }
        let mut rest = sequence;
        while let Some(length) = rest.first_chunk().and_then(|length| usize::try_from(i32::from_le_bytes(*length)).ok()) {
            let Some((document, after)) = rest.split_at_checked(length.max(4)) else { break };
            self.of_bulk_write(RawDocument::from_bytes(document).ok());
            rest = after;
        }
        self.everything |= self.namespaces.len() == before;
    }

    fn of_bulk_write(&mut self, namespace: Option<&RawDocument>) {
        match namespace.and_then(|namespace| namespace.get_str("ns").ok()) {
            Some(name) => self.full_name(name),
            None => self.everything = true,
        }
    }

    /// Walks through all that is in a pipeline, and takes whatever is called like a stage for one.
    fn stages(&mut self, value: RawBsonRef<'_>, database: &str) {
        let mut open = vec![value];
        while let Some(value) = open.pop() {
            let each = match value {
                RawBsonRef::Document(document) => document.iter_elements(),
                RawBsonRef::Array(array) => array.iter_elements(),
                _ => continue,
            };
            for element in each {
                let Ok((key, value)) = element.and_then(|element| Ok((element.key().as_str(), element.value()?))) else {
                    self.everything = true;
                    continue;
                };
                match key {
                    "$lookup" | "$graphLookup" => self.named(value, database, &["from"]),
                    "$unionWith" => self.named(value, database, &["coll"]),
                    "$out" => self.named(value, database, &["coll"]),
                    "$merge" => match value {
                        RawBsonRef::Document(merge) => match merge.get("into") {
                            Ok(Some(into)) => self.named(into, database, &["coll"]),
                            _ => self.everything = true,
                        },
                        name => self.named(name, database, &[]),
                    },
                    "$changeStream" => {
                        let all = value.as_document().and_then(|stream| stream.get("allChangesForCluster").ok().flatten());
                        self.everything |= all.is_some_and(|all| all.as_bool() != Some(false));
                    }
                    _ => {}
                }
                open.push(value);
            }
        }
    }

    /// A collection, by its name alone or by a document that has it in one of these fields, and another database in `db` if it likes.
    fn named(&mut self, value: RawBsonRef<'_>, database: &str, fields: &[&str]) {
        match value {
            RawBsonRef::String(name) => self.collection(database, name),
            RawBsonRef::Document(document) => {
                let database = document.get_str("db").unwrap_or(database);
                for field in fields {
                    match document.get(field) {
                        Ok(Some(RawBsonRef::String(name))) => self.collection(database, name),
                        // As $lookup from another database.
                        Ok(Some(RawBsonRef::Document(inner))) => match inner.get_str("coll") {
                            Ok(name) => self.collection(inner.get_str("db").unwrap_or(database), name),
                            Err(_) => self.everything = true,
                        },
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }

    fn collection(&mut self, database: &str, name: &str) {
        self.name(format!("{database}.{name}"));
        // The same documents, as they are stored.
        if let Some(series) = name.strip_prefix("system.buckets.") {
            self.name(format!("{database}.{series}"));
        }
    }

    fn name(&mut self, name: String) {
        if self.first.is_empty() {
            self.first.clone_from(&name);
        }
        self.namespaces.insert(name);
    }

    fn database(&mut self, name: &str) {
        if self.first.is_empty() {
            name.clone_into(&mut self.first);
        }
        self.databases.insert(name.to_owned());
    }

    fn full_name(&mut self, name: &str) {
        match name.split_once('.') {
            Some((database, collection)) => self.collection(database, collection),
            None => self.database(name),
        }
    }
}

/// Whether an aggregation or a `mapReduce` writes its result into a collection.
pub(super) fn writes(command: &Command<'_>) -> bool {
    let mut fields = command.body.iter_elements().flatten();
    match command.name {
        // A server takes these at the end of the outermost pipeline, and refuses them elsewhere.
        "aggregate" => fields.any(|field| {
            let Ok(RawBsonRef::Array(stages)) = field.value() else { return false };
            let mut stages = stages.into_iter().flatten().filter_map(RawBsonRef::as_document);
            field.key().as_str() == "pipeline"
                && stages
                    .any(|stage| stage.iter_elements().flatten().any(|stage| matches!(stage.key().as_str(), "$out" | "$merge")))
        }),
        "mapReduce" | "mapreduce" => fields.any(|field| {
            let is_inline = match field.value() {
                Ok(RawBsonRef::Document(out)) => matches!(out.get("inline"), Ok(Some(_))),
                _ => false,
            };
            field.key().as_str() == "out" && !is_inline
        }),
        _ => false,
    }
}
