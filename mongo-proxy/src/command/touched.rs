//! The namespaces that a command reads or writes.
//!
//! What is named is found, wherever it is named: in the command itself, in the stages of a pipeline, in a bulk write. What stands behind a view
//! only the server knows.

use std::collections::BTreeSet;

use bson::{RawBsonRef, RawDocument};

use super::{Command, LONGEST_NAMESPACE, kind::Kind};

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
        match command.kind() {
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
                // Elsewhere it is a shard.
                let to = (command.name == "renameCollection").then_some("to");
                for key in [Some(command.name), to].into_iter().flatten() {
                    match command.body.get(key) {
                        Ok(Some(RawBsonRef::String(name))) => self.full_name(name),
                        Ok(None) => {}
                        _ => self.everything = true,
                    }
                }
            }
            Kind::OnDatabase(_) if command.name == "bulkWrite" => self.bulk_write(command.body, of_bulk_write),
            Kind::OnDatabase(_) => self.database(database),
            Kind::OnServer(_) => {}
            Kind::OnEverything(_) | Kind::Unknown => self.everything = true,
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
                    "$unionWith" | "$out" => self.named(value, database, &["coll"]),
                    "$merge" => self.merge(value, database),
                    "$changeStream" => {
                        let all = value.as_document().map(|stream| stream.get("allChangesForCluster"));
                        self.everything |= !matches!(all, None | Some(Ok(None | Some(RawBsonRef::Boolean(false)))));
                    }
                    "$listSampledQueries" => match value.as_document().map(|stage| stage.get_str("namespace")) {
                        Some(Ok(name)) => self.full_name(name),
                        _ => self.everything = true,
                    },
                    _ => {}
                }
                open.push(value);
            }
        }
    }

    fn merge(&mut self, value: RawBsonRef<'_>, database: &str) {
        let RawBsonRef::Document(merge) = value else { return self.named(value, database, &[]) };
        let mut is_named = false;
        for field in merge.iter_elements() {
            match field.and_then(|field| Ok((field.key().as_str(), field.value()?))) {
                Ok(("into", into)) => {
                    is_named = true;
                    self.named(into, database, &["coll"]);
                }
                Ok(_) => {}
                Err(_) => self.everything = true,
            }
        }
        self.everything |= !is_named;
    }

    /// A collection, by its name alone or by a document that has it in one of these fields, and another database in `db` if it likes. What is there
    /// twice is taken both ways, as a server may take it either way.
    fn named(&mut self, value: RawBsonRef<'_>, database: &str, fields: &[&str]) {
        let document = match value {
            RawBsonRef::String(name) => return self.collection(database, name),
            RawBsonRef::Document(document) => document,
            _ => return,
        };
        let (mut databases, mut names) = (Vec::new(), Vec::new());
        for field in document.iter_elements() {
            match field.and_then(|field| Ok((field.key().as_str(), field.value()?))) {
                Ok(("db", RawBsonRef::String(name))) => databases.push(name),
                Ok((key, value)) if fields.contains(&key) => names.push(value),
                Ok(_) => {}
                Err(_) => self.everything = true,
            }
        }
        let database = match databases.as_slice() {
            [] => database,
            [database] => database,
            _ => return self.everything = true,
        };
        for name in names {
            match name {
                RawBsonRef::String(name) => self.collection(database, name),
                // As $lookup from another database.
                RawBsonRef::Document(_) => self.named(name, database, &["coll"]),
                _ => {}
            }
        }
    }

    fn collection(&mut self, database: &str, name: &str) {
        self.name(database, name);
        // The same documents, as they are stored.
        if let Some(series) = name.strip_prefix("system.buckets.") {
            self.name(database, series);
        }
    }

    fn name(&mut self, database: &str, collection: &str) {
        // There is no longer one, and whoever names so many might as well name all.
        if database.len() + collection.len() > LONGEST_NAMESPACE || self.namespaces.len() + self.databases.len() >= MOST_NAMES {
            self.everything = true;
            return;
        }
        let name = format!("{database}.{collection}");
        if self.first.is_empty() {
            self.first.clone_from(&name);
        }
        self.namespaces.insert(name);
    }

    fn database(&mut self, name: &str) {
        if name.len() > LONGEST_NAMESPACE || self.databases.len() >= MOST_NAMES {
            self.everything = true;
            return;
        }
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

/// Whether a command that reads in general writes this time: a result into a collection, or what it repairs. What cannot be read is taken for the worst.
pub(super) fn writes(command: &Command<'_>) -> bool {
    if !matches!(command.name, "aggregate" | "mapReduce" | "mapreduce" | "validate") {
        return false;
    }
    command.body.iter_elements().any(|field| {
        let Ok(field) = field else { return true };
        match (command.name, field.key().as_str(), field.value()) {
            ("aggregate", "pipeline", Ok(RawBsonRef::Array(stages))) => stages.iter_elements().any(|stage| match stage {
                Ok(stage) => match stage.value() {
                    Ok(RawBsonRef::Document(stage)) => has_output(stage),
                    Ok(_) => false,
                    Err(_) => true,
                },
                Err(_) => true,
            }),
            ("mapReduce" | "mapreduce", "out", Ok(RawBsonRef::Document(out))) => !matches!(out.get("inline"), Ok(Some(_))),
            ("mapReduce" | "mapreduce", "out", _) => true,
            ("validate", "repair" | "fixMultikey", value) => !matches!(value, Ok(RawBsonRef::Boolean(false))),
            ("aggregate", "pipeline", Err(_)) => true,
            _ => false,
        }
    })
}

/// Whether a stage writes. A server takes these at the end of the outermost pipeline, and refuses them elsewhere.
fn has_output(stage: &RawDocument) -> bool {
    stage.iter_elements().any(|field| field.map_or(true, |field| matches!(field.key().as_str(), "$out" | "$merge")))
}

/// Namespaces of a bulk write may be many.
const MOST_NAMES: usize = 10_000;
