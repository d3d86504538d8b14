//! What is known of commands.

use bson::{Document, doc, rawdoc};

use super::{kind::Access, touched::Touched, *};

fn touched(command: &Document, of_bulk_write: &[Document]) -> Touched {
    let body = command.to_vec().unwrap();
    let sequence: Vec<u8> = of_bulk_write.iter().flat_map(|document| document.to_vec().unwrap()).collect();
    Touched::by(&Command::read(&body, None).unwrap(), &sequence)
}

fn names(command: &Document) -> (Vec<String>, Vec<String>, bool) {
    let touched = touched(command, &[]);
    (touched.namespaces.into_iter().collect(), touched.databases.into_iter().collect(), touched.everything)
}

fn access(command: &Document) -> Option<Access> {
    let body = command.to_vec().unwrap();
    Command::read(&body, None).unwrap().access()
}

#[test]
fn a_namespace_is_found_wherever_it_is_named() {
    let just = |all: &[&str]| (all.iter().map(ToString::to_string).collect(), vec![], false);
    let cases = [
        (doc! { "find": "a", "$db": "d" }, just(&["d.a"])),
        (doc! { "insert": "a.b", "$db": "d" }, just(&["d.a.b"])),
        (doc! { "getMore": 7_i64, "collection": "a", "$db": "d" }, just(&["d.a"])),
        (doc! { "renameCollection": "d.a", "to": "e.b", "$db": "admin" }, just(&["d.a", "e.b"])),
        (doc! { "shardCollection": "d.a", "$db": "admin" }, just(&["d.a"])),
        (doc! { "explain": { "find": "a" }, "$db": "d" }, just(&["d.a"])),
        (doc! { "create": "v", "viewOn": "a", "pipeline": [{ "$unionWith": "b" }], "$db": "d" }, just(&["d.a", "d.b", "d.v"])),
        (doc! { "mapReduce": "a", "out": { "merge": "b", "db": "e" }, "$db": "d" }, just(&["d.a", "e.b"])),
        (doc! { "find": "system.buckets.a", "$db": "d" }, just(&["d.a", "d.system.buckets.a"])),
        (
            doc! { "aggregate": "a", "pipeline": [
                { "$lookup": { "from": "b", "pipeline": [{ "$graphLookup": { "from": "c" } }] } },
                { "$lookup": { "from": { "db": "e", "coll": "x" } } },
                { "$facet": { "one": [{ "$unionWith": { "coll": "u", "pipeline": [{ "$lookup": { "from": "w" } }] } }] } },
                { "$out": { "db": "e", "coll": "o" } },
            ], "$db": "d" },
            just(&["d.a", "d.b", "d.c", "d.u", "d.w", "e.o", "e.x"]),
        ),
        (doc! { "aggregate": "a", "pipeline": [{ "$merge": { "into": "m" } }], "$db": "d" }, just(&["d.a", "d.m"])),
        (
            doc! { "aggregate": "a", "pipeline": [{ "$merge": { "into": { "db": "e", "coll": "m" } } }], "$db": "d" },
            just(&["d.a", "e.m"]),
        ),
        (doc! { "aggregate": "a", "pipeline": [{ "$merge": "m" }], "$db": "d" }, just(&["d.a", "d.m"])),
        (doc! { "bulkWrite": 1, "nsInfo": [{ "ns": "d.a" }, { "ns": "e.b" }], "$db": "admin" }, just(&["d.a", "e.b"])),
    ];
    for (command, expected) in cases {
        assert_eq!(names(&command), expected, "{command}");
    }
    // A bulk write names them behind its body, in general.
    let bulk = touched(&doc! { "bulkWrite": 1, "$db": "admin" }, &[doc! { "ns": "d.a" }, doc! { "ns": "e.b" }]);
    assert_eq!((bulk.namespaces.len(), bulk.everything, bulk.first.as_str()), (2, false, "d.a"));
}

#[test]
fn what_names_no_collection_is_about_a_whole_database_and_what_cannot_be_known_about_everything() {
    for command in [
        doc! { "dropDatabase": 1, "$db": "d" },
        doc! { "aggregate": 1, "pipeline": [{ "$currentOp": {} }], "$db": "d" },
        // By an identifier.
        doc! { "find": bson::Uuid::from_bytes([7; 16]), "$db": "d" },
        // Its first value is a user, and no collection.
        doc! { "createUser": "a", "$db": "d" },
    ] {
        assert_eq!(names(&command), (vec![], vec!["d".to_owned()], false), "{command}");
    }
    for command in [
        doc! { "aggregate": 1, "pipeline": [{ "$changeStream": { "allChangesForCluster": true } }], "$db": "admin" },
        doc! { "commandOfTomorrow": "a", "$db": "d" },
        doc! { "aggregate": "a", "pipeline": [{ "$lookup": { "from": "b", "db": "x", "db ": 1 } }, { "$merge": { "on": "x" } }], "$db": "d" },
        doc! { "find": "x".repeat(256), "$db": "d" },
        doc! { "aggregate": 1, "pipeline": [{ "$listSampledQueries": {} }], "$db": "admin" },
        doc! { "applyOps": [{ "op": "i", "ns": "d.a", "o": {} }], "$db": "admin" },
        doc! { "bulkWrite": 1, "nsInfo": [{ "ns": 5 }], "$db": "admin" },
        doc! { "bulkWrite": 1, "$db": "admin" },
        doc! { "explain": { "find": "a", "$db": "e" }, "$db": "d" },
        doc! { "explain": 1, "$db": "d" },
        doc! { "aggregate": "a", "pipeline": [{ "$merge": {} }], "$db": "d" },
    ] {
        assert!(names(&command).2, "{command}");
    }
}

#[test]
fn what_is_about_the_server_touches_nobodys_data() {
    for name in ["buildInfo", "serverStatus", "listDatabases", "startSession", "connectionStatus", "setParameter", "shutdown"] {
        assert_eq!(names(&doc! { name: 1, "$db": "admin" }), (vec![], vec![], false), "{name}");
    }
}

#[test]
fn whatever_names_a_namespace_in_full_touches_it_from_any_database() {
    for name in [
        "renameCollection",
        "shardCollection",
        "shardcollection",
        "moveChunk",
        "movechunk",
        "dataSize",
        "datasize",
        "split",
        "analyzeShardKey",
        "configureQueryAnalyzer",
        "getShardVersion",
        "mergeAllChunksOnShard",
        "reshardCollection",
    ] {
        assert_eq!(
            names(&doc! { name: "shop.secret", "$db": "admin" }),
            (vec!["shop.secret".to_owned()], vec![], false),
            "{name}"
        );
    }
    let sampled =
        doc! { "aggregate": 1, "pipeline": [{ "$listSampledQueries": { "namespace": "shop.secret" } }], "$db": "admin" };
    assert_eq!(names(&sampled).0, ["shop.secret"]);
}

/// The same bytes with another one in the place of each `?`.
fn with_byte(document: &Document, byte: u8) -> Vec<u8> {
    document.to_vec().unwrap().into_iter().map(|there| if there == b'?' { byte } else { there }).collect()
}

#[test]
fn what_cannot_be_read_is_taken_for_the_worst() {
    // A server does not look at the keys of an array, and text need not be UTF-8 for it.
    for command in [
        doc! { "aggregate": "c", "pipeline": { "?": { "$match": {} }, "1": { "$out": "victim" } }, "$db": "d" },
        doc! { "aggregate": "c", "pipeline": { "0": { "?": {} }, "1": { "$out": "victim" } }, "$db": "d" },
    ] {
        // An array is a document of another type.
        let mut body = with_byte(&command, 0xff);
        let at = body.windows(9).position(|bytes| bytes == b"pipeline\0").unwrap() - 1;
        body[at] = 4;
        let command = Command::read(&body, None).unwrap();
        assert_eq!(command.access(), Some(Access::Write));
        assert!(Touched::by(&command, &[]).everything);
    }
    let body = with_byte(&doc! { "aggregate": "c", "pipeline": [{ "$lookup": { "?": 1, "from": "secret" } }], "$db": "d" }, 0xff);
    assert!(Touched::by(&Command::read(&body, None).unwrap(), &[]).everything);
    let twice = doc! { "aggregate": "c", "pipeline": [{ "$lookup": { "from": "open", "fro?": "secret" } }], "$db": "d" };
    let body = with_byte(&twice, b'm');
    assert!(Touched::by(&Command::read(&body, None).unwrap(), &[]).namespaces.contains("d.secret"));
    let login = with_byte(&doc! { "?": 1, "mechanism": "SCRAM-SHA-256" }, 0xff);
    assert!(crate::hello::shows_certificate(RawDocument::from_bytes(&login).unwrap()));
    // No database has such a name.
    let long = doc! { "find": "c", "$db": "x".repeat(64) }.to_vec().unwrap();
    assert_eq!(Command::read(&long, None).unwrap_err(), Malformed::Bson);
}

#[test]
fn of_very_many_namespaces_not_all_are_remembered() {
    let stages: Vec<Document> = (0..20_000).map(|number| doc! { "$unionWith": format!("c{number}") }).collect();
    let touched = touched(&doc! { "aggregate": "a", "pipeline": stages, "$db": "d" }, &[]);
    assert!(touched.everything && touched.namespaces.len() == 10_000);
}

#[test]
fn every_write_is_known_as_one_and_what_is_not_known_is_taken_for_one() {
    let on = |name: &str| doc! { name: "c", "$db": "d" };
    for name in [
        "insert",
        "update",
        "delete",
        "findAndModify",
        "findandmodify",
        "bulkWrite",
        "create",
        "createIndexes",
        "drop",
        "dropIndexes",
        "deleteIndexes",
        "collMod",
        "renameCollection",
        "convertToCapped",
        "dropDatabase",
        "createUser",
        "updateUser",
        "dropUser",
        "grantRolesToUser",
        "createRole",
        "setParameter",
        "shutdown",
        "fsync",
        "applyOps",
        "compact",
        "killOp",
        "killAllSessions",
        "replSetStepDown",
        "setFeatureCompatibilityVersion",
        "profile",
        "clearLog",
        "tomorrow",
    ] {
        assert_eq!(access(&on(name)), Some(Access::Write), "{name}");
    }
    for name in ["find", "count", "distinct", "aggregate", "listIndexes", "listCollections", "serverStatus", "getMore", "explain"]
    {
        assert_eq!(access(&on(name)), Some(Access::Read), "{name}");
    }
    for name in ["hello", "isMaster", "ping", "saslStart", "commitTransaction", "killCursors", "endSessions"] {
        assert_eq!(access(&on(name)), None, "{name}");
    }
    let aggregate = |stage: Document| access(&doc! { "aggregate": "c", "pipeline": [{ "$match": {} }, stage], "$db": "d" });
    assert_eq!(aggregate(doc! { "$out": "x" }), Some(Access::Write));
    assert_eq!(aggregate(doc! { "$merge": { "into": "x" } }), Some(Access::Write));
    assert_eq!(aggregate(doc! { "$project": { "$out": 1 } }), Some(Access::Read));
    assert_eq!(access(&doc! { "validate": "c", "repair": true, "$db": "d" }), Some(Access::Write));
    assert_eq!(access(&doc! { "validate": "c", "full": true, "$db": "d" }), Some(Access::Read));
    assert_eq!(access(&doc! { "mapReduce": "c", "out": "x", "$db": "d" }), Some(Access::Write));
    assert_eq!(access(&doc! { "mapReduce": "c", "out": { "inline": 1 }, "$db": "d" }), Some(Access::Read));
}

#[test]
fn what_a_command_says_of_itself_is_read() {
    let body = rawdoc! { "find": "c", "maxTimeMS": 250, "autocommit": false, "startTransaction": true, "$db": "d" };
    let command = Command::read(body.as_bytes(), None).unwrap();
    assert_eq!((command.collection(), command.max_time), (Some("c"), Some(Duration::from_millis(250))));
    assert_eq!(command.transaction, Transaction::Starts);
    let body = rawdoc! { "find": "c", "maxTimeMS": 0, "autocommit": false, "$db": "d" };
    let command = Command::read(body.as_bytes(), None).unwrap();
    assert_eq!((command.max_time, command.transaction), (None, Transaction::GoesOn));
    assert!(command.continues() && !command.is_always_let_through());
    // Of two databases nobody knows which.
    let twice = doc! { "find": "c", "$db": "d", "$dc": "e" }.to_vec().unwrap();
    let twice: Vec<u8> =
        twice.iter().enumerate().map(|(at, byte)| if twice[..at].ends_with(b"$d") { b'b' } else { *byte }).collect();
    assert_eq!(Command::read(&twice, None).unwrap_err(), Malformed::Bson);
    // Text that is not UTF-8 is the server's business, but where it says what is asked for.
    let mut latin = doc! { "find": "c", "comment": "?", "$db": "d" }.to_vec().unwrap();
    let at = latin.iter().position(|byte| *byte == b'?').unwrap();
    latin[at] = 0xe4;
    assert_eq!(Command::read(&latin, None).unwrap().collection(), Some("c"));
}
