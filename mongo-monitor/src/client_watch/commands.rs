//! A client's operations.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    time::Duration,
};

use mongo_core::{
    bson::{Bson, Document},
    mongodb::{
        error::{Error, ErrorKind},
        event::command::{CommandEvent, ConnectionInfo},
    },
};

use super::distribution::Distribution;
use crate::{
    reading::{Reading, Value, reading},
    table::{is_on_collection, metric},
};

#[derive(Debug, Default)]
pub(super) struct Commands {
    /// What those are about that are under way: only the first event of a command tells it.
    under_way: HashMap<Id, Namespace>,
    /// The last that began, also those that have ended.
    order: VecDeque<Id>,
    done: BTreeMap<Key, Distribution>,
    overloads: BTreeMap<String, u64>,
}

/// Request, and the server: several clients may have given one number.
type Id = (i32, String);
/// Database and collection.
type Namespace = (String, String);
/// Command, database, collection, server, and the error.
type Key = [String; 5];

impl Commands {
    pub(super) fn take(&mut self, event: &CommandEvent) {
        match event {
            CommandEvent::Started(started) => {
                let collection = collection(&started.command).unwrap_or_default();
                let id = id(started.request_id, &started.connection);
                self.under_way.insert(id.clone(), (started.db.clone(), collection.to_owned()));
                self.order.push_back(id);
                // Of an operation whose future was dropped the end is never told.
                while self.order.len() > UNDER_WAY {
                    if let Some(oldest) = self.order.pop_front() {
                        self.under_way.remove(&oldest);
                    }
                }
            }
            CommandEvent::Succeeded(done) => {
                self.end(id(done.request_id, &done.connection), &done.command_name, done.duration, String::new());
            }
            CommandEvent::Failed(failed) => {
                let id = id(failed.request_id, &failed.connection);
                if failed.failure.contains_label("SystemOverloadedError") {
                    *self.overloads.entry(id.1.clone()).or_default() += 1;
                }
                self.end(id, &failed.command_name, failed.duration, error_type(&failed.failure));
            }
            _ => {}
        }
    }

    fn end(&mut self, id: Id, command: &str, took: Duration, error: String) {
        let (database, collection) = self.under_way.remove(&id).unwrap_or_default();
        let mut key = [command.to_owned(), database, collection, id.1, error];
        if self.done.len() >= SERIES && !self.done.contains_key(&key) {
            if !is_on_collection(command) {
                OTHER.clone_into(&mut key[0]);
            }
            OTHER.clone_into(&mut key[1]);
            OTHER.clone_into(&mut key[2]);
        }
        self.done.entry(key).or_default().add(took);
    }

    pub(super) fn readings(&self) -> Vec<Reading> {
        let duration = metric("db_client_operation_duration_seconds").into_iter();
        let done = duration.flat_map(|metric| {
            self.done.iter().map(move |(key, took)| Reading {
                metric,
                labels: key.to_vec(),
                value: Value::Histogram(took.value()),
            })
        });
        #[expect(clippy::cast_precision_loss, reason = "a count")]
        let overloads = self.overloads.iter().map(|(server, count)| (server, *count as f64));
        let overloads = overloads.filter_map(|(server, count)| reading("mongodb_client_overload_errors_total", &[server], count));
        done.chain(overloads).collect()
    }
}

fn id(request: i32, connection: &ConnectionInfo) -> Id {
    (request, connection.address.to_string())
}

/// What a command works on: the value of its first field, and for `getMore` that of another.
fn collection(command: &Document) -> Option<&str> {
    match command.iter().next()? {
        (name, _) if name == "getMore" => command.get_str("collection").ok(),
        (name, Bson::String(collection)) if is_on_collection(name) => Some(collection),
        _ => None,
    }
}

/// As OpenTelemetry wants it: the server's code, or the kind of failure.
fn error_type(error: &Error) -> String {
    match &*error.kind {
        ErrorKind::Command(error) => error.code.to_string(),
        ErrorKind::Io(error) => format!("io_{:?}", error.kind()).to_lowercase(),
        ErrorKind::Authentication { .. } => "authentication".to_owned(),
        _ => "_other".to_owned(),
    }
}

const SERIES: usize = 1000;
const UNDER_WAY: usize = 10_000;
const OTHER: &str = "_other";

#[cfg(test)]
mod tests {
    use mongo_core::bson::doc;

    use super::*;

    #[test]
    fn the_collection_of_a_command_is_known() {
        assert_eq!(collection(&doc! { "find": "orders", "filter": {} }), Some("orders"));
        assert_eq!(collection(&doc! { "getMore": 5_i64, "collection": "orders" }), Some("orders"));
        assert_eq!(collection(&doc! { "aggregate": 1, "pipeline": [] }), None);
        assert_eq!(collection(&doc! {}), None);
        // Whom a command is about is a value.
        assert_eq!(collection(&doc! { "usersInfo": "ada@example.org" }), None);
        assert_eq!(collection(&doc! { "noSuchCommand": "ada@example.org" }), None);
    }

    #[test]
    fn names_without_end_do_not_become_series_without_end() {
        let mut commands = Commands::default();
        for number in 0..3 * SERIES {
            let id = (1, "a:1".to_owned());
            commands.under_way.insert(id.clone(), ("shop".to_owned(), format!("tenant_{number}")));
            commands.end(id, "find", Duration::from_millis(1), String::new());
        }
        let readings = commands.readings();
        assert_eq!(readings.len(), SERIES + 1);
        let other = readings.iter().find(|reading| reading.label("db_collection_name") == Some(OTHER)).unwrap();
        assert_eq!(other.as_number(), 2.0 * SERIES as f64);
    }
}
