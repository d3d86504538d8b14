//! Data that backup tools get wrong: the cases 1-19 and 21-24 of the family's list, as far as one server holds them.

use mongo_core::{
    Deployment,
    bson::{Binary, Bson, Document, RawDocumentBuf, Timestamp, doc, rawdoc, spec::BinarySubtype},
    transfer::write::WriteTarget,
};

/// The databases that [`write`] fills.
pub(crate) const DATABASES: [&str; 3] = ["awkward", "files", "Second-DB_2"];

/// Writes every case. Panics if the server refuses one: then the case would not be tested.
pub(crate) async fn write(deployment: &Deployment) {
    ids(deployment).await;
    values(deployment).await;
    names(deployment).await;
    kinds(deployment).await;
    indexes(deployment).await;
    other_databases(deployment).await;
}

/// Inserts raw documents exactly, zero timestamps included.
async fn exactly(deployment: &Deployment, collection: &str, documents: &[RawDocumentBuf]) {
    let namespace = format!("awkward.{collection}").parse().unwrap();
    let target = WriteTarget::new(deployment.clone(), namespace);
    let references: Vec<_> = documents.iter().map(AsRef::as_ref).collect();
    let outcome = target.write(&references).await.unwrap();
    assert_eq!(outcome.refused, [], "{collection}");
}

/// A document from its element bytes.
fn raw(elements: &[u8]) -> RawDocumentBuf {
    let mut bytes = i32::try_from(elements.len() + 5).unwrap().to_le_bytes().to_vec();
    bytes.extend_from_slice(elements);
    bytes.push(0);
    RawDocumentBuf::from_bytes(bytes).unwrap()
}

/// Cases 1 and 2: `_id`s of every type, and numbers that compare equal to none other here.
async fn ids(deployment: &Deployment) {
    let binary = |subtype, bytes: &[u8]| Bson::Binary(Binary { subtype, bytes: bytes.to_vec() });
    let ids: Vec<Bson> = vec![
        Bson::Int32(1),
        Bson::Double(1.5),
        Bson::Int64(1 << 60),
        Bson::Decimal128("3".parse().unwrap()),
        Bson::Double(f64::NAN),
        Bson::Double(f64::INFINITY),
        Bson::Decimal128("-Infinity".parse().unwrap()),
        Bson::Double(-0.0),
        Bson::Decimal128("9.00".parse().unwrap()),
        "a".into(),
        "".into(),
        Bson::Symbol("symbol".into()),
        Bson::Document(doc! { "a": 1 }),
        Bson::Document(doc! { "a": 1, "b": 2 }),
        Bson::Document(doc! { "g": 1, "c": 2, "a": 3 }),
        binary(BinarySubtype::Generic, b"\x01\x02"),
        binary(BinarySubtype::Uuid, &[7; 16]),
        Bson::ObjectId(mongo_core::bson::oid::ObjectId::from_bytes([5; 12])),
        true.into(),
        false.into(),
        Bson::DateTime(mongo_core::bson::DateTime::from_millis(-1)),
        Bson::Timestamp(Timestamp { time: 5, increment: 6 }),
        Bson::Timestamp(Timestamp { time: 0, increment: 0 }),
        Bson::JavaScriptCode("f()".into()),
        Bson::MinKey,
        Bson::MaxKey,
        Bson::Null,
    ];
    let documents: Vec<_> =
        ids.into_iter().map(|id| RawDocumentBuf::try_from(&doc! { "_id": id, "case": "id" }).unwrap()).collect();
    exactly(deployment, "mixed_ids", &documents).await;
}

/// Cases 4 to 9: values and field names, to the bit.
async fn values(deployment: &Deployment) {
    let id = |text: &[u8]| [b"\x02_id\0", &u32::try_from(text.len() + 1).unwrap().to_le_bytes()[..], text, b"\0"].concat();
    let zero = Bson::Timestamp(Timestamp { time: 0, increment: 0 });
    // What no reader that insists on valid text can read, and the server stores all the same.
    let unreadable = [
        raw(&[&id(b"not utf-8")[..], b"\x02s\0\x06\0\0\0caf\xe9\xff\0"].concat()),
        raw(&[&id(b"a name of no text")[..], b"\x10\xff\xfe\0\x01\0\0\0"].concat()),
        raw(&[&id(b"old binary without its length")[..], b"\x05b\0\x03\0\0\0\x02abc"].concat()),
        raw(b"\x02_id\0\x04\0\0\0i\xe9d\0"),
    ];
    exactly(deployment, "unreadable", &unreadable).await;
    // Keys as large as documents: the nodes of a tree hold the first one of each segment.
    let large_keys: Vec<_> = (0..40).map(|number| rawdoc! { "_id": format!("{number:03}{}", "k".repeat(700_000)) }).collect();
    exactly(deployment, "large_keys", &large_keys).await;
    let binaries: Vec<Bson> = [3_u8, 5, 6, 9, 0x80]
        .into_iter()
        .map(|subtype| Bson::Binary(Binary { subtype: BinarySubtype::from(subtype), bytes: vec![1; 16] }))
        .collect();
    let scope =
        Bson::JavaScriptCodeWithScope(mongo_core::bson::JavaScriptCodeWithScope { code: "x".into(), scope: doc! { "aaa": 1 } });
    let mut documents = vec![
        // Duplicate names, NaN payload bits, negative zero, far dates, undefined, symbol, old binary, DBPointer, code with scope.
        raw(&[&id(b"duplicate")[..], b"\x10a\0\x01\0\0\0", b"\x10a\0\x02\0\0\0"].concat()),
        raw(&[&id(b"nan")[..], b"\x01v\0", &0x7ff8_dead_beef_0001_u64.to_le_bytes()].concat()),
        raw(&[&id(b"dates")[..], b"\x09a\0", &i64::MIN.to_le_bytes(), b"\x09b\0", &i64::MAX.to_le_bytes()].concat()),
        raw(&[&id(b"undefined")[..], b"\x06u\0", b"\x0es\0\x03\0\0\0ab\0"].concat()),
        raw(&[&id(b"old binary")[..], b"\x05b\0\x07\0\0\0\x02\x03\0\0\0abc"].concat()),
        raw(&[&id(b"pointer")[..], b"\x0cp\0\x02\0\0\0c\0ABCDEFGHIJKL"].concat()),
        RawDocumentBuf::try_from(&doc! { "_id": "scope", "c": scope }).unwrap(),
        RawDocumentBuf::try_from(&doc! { "_id": "decimals", "v": [
            Bson::Decimal128("1.0".parse().unwrap()), Bson::Decimal128("1.00".parse().unwrap()), Bson::Decimal128("-0".parse().unwrap()), Bson::Decimal128("NaN".parse().unwrap())
        ], "minus zero": -0.0 })
        .unwrap(),
        RawDocumentBuf::try_from(&doc! { "_id": "zero timestamps", "top": zero.clone(), "nested": { "t": zero.clone() }, "array": [zero] }).unwrap(),
        RawDocumentBuf::try_from(&doc! { "_id": "names", "": 1, "a.b": 2, "x": { "$y": 3, "c.d": { "": 4 }, "$$": 5 }, "0": "zero", "array": [[], [[]], {}, Bson::Null] }).unwrap(),
        RawDocumentBuf::try_from(&doc! { "_id": "binaries", "v": binaries }).unwrap(),
        rawdoc! { "_id": "text", "ключ": "値", "nul": "a\0b" },
    ];
    if deployment.server_version().major >= 5 {
        documents.push(RawDocumentBuf::try_from(&doc! { "_id": "dollar", "$x": 1, "y": { "$set": 2 } }).unwrap());
    }
    exactly(deployment, "values", &documents).await;

    let mut deep = doc! {};
    for _ in 0..95 {
        deep = doc! { "d": deep };
    }
    let database = deployment.database("awkward");
    database.collection::<Document>("deep").insert_one(doc! { "_id": 1, "deep": deep }).await.unwrap();
    // Exactly the largest document that a server takes: the size without the filling is found by measuring.
    let empty = RawDocumentBuf::try_from(&doc! { "_id": 1, "filling": "" }).unwrap().as_bytes().len();
    let largest = doc! { "_id": 1, "filling": "x".repeat((16 << 20) - empty) };
    exactly(deployment, "largest", &[RawDocumentBuf::try_from(&largest).unwrap()]).await;
}

/// Cases 10 and 11: empty collections and names.
async fn names(deployment: &Deployment) {
    let database = deployment.database("awkward");
    database.create_collection("empty").await.unwrap();
    for name in [
        "with space",
        "per%cent",
        "plus+",
        "dots.in.name",
        "ünïcode",
        "x.bson",
        "y.metadata",
        "UPPER",
        "upper",
        "quote\"",
        "sl/ash",
        "back\\slash",
        "tab\tname",
        "-dash",
        "#hash",
        "a*b",
        &"é".repeat(100),
    ] {
        database.collection::<Document>(name).insert_one(doc! { "_id": name }).await.unwrap();
    }
    let full = database.collection::<Document>("full_of_indexes");
    full.insert_one(doc! { "_id": 1 }).await.unwrap();
    let keys: Vec<Document> =
        (0..63).map(|number| doc! { "key": { format!("field{number}"): 1 }, "name": format!("index {number} *") }).collect();
    database.run_command(doc! { "createIndexes": "full_of_indexes", "indexes": keys }).await.unwrap();
}

/// Cases 14 to 18, 23: views, time series, capped, clustered, validators, collations.
async fn kinds(deployment: &Deployment) {
    let database = deployment.database("awkward");
    let insert = async |collection: &str, documents: Vec<Document>| {
        database.collection::<Document>(collection).insert_many(documents).await.unwrap();
    };
    let create = async |command: Document| {
        database.run_command(command).await.unwrap();
    };
    let version = deployment.server_version();

    create(doc! { "create": "view", "viewOn": "values", "pipeline": [{ "$match": { "v": 1 } }] }).await;
    create(doc! { "create": "view_on_view", "viewOn": "view", "pipeline": [{ "$project": { "v": 1 } }] }).await;
    create(doc! { "create": "a_view_on_a_later_one", "viewOn": "view_on_view", "pipeline": [] }).await;
    create(doc! { "create": "view_of_nothing", "viewOn": "nothing", "pipeline": [] }).await;
    create(doc! { "create": "collated_view", "viewOn": "values", "pipeline": [], "collation": { "locale": "en" } }).await;

    create(doc! { "create": "capped", "capped": true, "size": 1 << 20, "max": 500 }).await;
    insert("capped", (0..600).map(|number| doc! { "_id": 1000 - number, "number": number }).collect()).await;

    if version.major >= 5 {
        create(doc! { "create": "series", "timeseries": { "timeField": "t", "metaField": "m", "granularity": "minutes" }, "expireAfterSeconds": 1_000_000_000_i64 }).await;
        let at = |second: i64| Bson::DateTime(mongo_core::bson::DateTime::from_millis(1_700_000_000_000 + second * 1000));
        insert(
            "series",
            (0..3000).map(|number| doc! { "t": at(number * 37), "m": { "s": number % 5 }, "v": number as f64 / 3.0 }).collect(),
        )
        .await;
        create(doc! { "createIndexes": "series", "indexes": [{ "key": { "m.s": 1, "t": 1 }, "name": "m.s_1_t_1" }] }).await;
        create(doc! { "create": "series_without_meta", "timeseries": { "timeField": "t" } }).await;
        insert("series_without_meta", (0..200).map(|number| doc! { "t": at(0), "v": if number % 2 == 0 { Bson::Int64(number) } else { Bson::String(number.to_string()) } }).collect()).await;
    }
    if version >= mongo_core::ServerVersion::new(5, 3, 0) {
        create(doc! { "create": "clustered", "clusteredIndex": { "key": { "_id": 1 }, "unique": true, "name": "the clustered key" }, "expireAfterSeconds": 1_000_000_000_i64 }).await;
        insert("clustered", (0..300).map(|number| doc! { "_id": number, "n": number }).collect()).await;
    }

    insert("validated", vec![doc! { "_id": 1, "age": "not a number" }, doc! { "_id": 2, "age": 3 }]).await;
    create(doc! { "collMod": "validated", "validator": { "$jsonSchema": { "bsonType": "object", "properties": { "age": { "bsonType": "int" } } } }, "validationLevel": "moderate", "validationAction": "error" }).await;
    insert("warned", vec![doc! { "_id": 1 }]).await;
    create(doc! { "collMod": "warned", "validator": { "must": { "$exists": true } }, "validationAction": "warn" }).await;

    create(doc! { "create": "collated", "collation": { "locale": "fr", "strength": 1 } }).await;
    insert("collated", ["cote", "b", "Z", "ä"].iter().map(|id| doc! { "_id": *id, "s": *id }).collect()).await;
    create(doc! { "createIndexes": "collated", "indexes": [
        { "key": { "s": 1 }, "name": "inherits", "collation": { "locale": "fr", "strength": 1 } },
        { "key": { "s": 1 }, "name": "simple", "collation": { "locale": "simple" } },
        { "key": { "s": -1 }, "name": "german", "collation": { "locale": "de" } },
    ] })
    .await;
}

/// Cases 19, 21, 22: every kind of index and option.
async fn indexes(deployment: &Deployment) {
    let database = deployment.database("awkward");
    let documents = (0..200).map(|k| {
        doc! { "_id": k, "a": k % 10, "b": k.to_string(), "loc": { "type": "Point", "coordinates": [k % 180, k % 80] }, "xy": [k % 100, k % 50],
            "t": format!("hello world {k}"), "when": mongo_core::bson::DateTime::from_millis(946_684_800_000), "w": { "x": k, "y": [1, 2] } }
    });
    database.collection::<Document>("indexed").insert_many(documents).await.unwrap();
    let indexes = vec![
        doc! { "key": { "a": 1, "b": -1 }, "name": "a_1_b_-1" },
        doc! { "key": { "b": 1 }, "name": "odd name * (x)", "unique": true, "partialFilterExpression": { "a": { "$gt": 3 } } },
        doc! { "key": { "zz": 1 }, "name": "sparse", "sparse": true },
        doc! { "key": { "uz": 1 }, "name": "unique sparse", "sparse": true, "unique": true },
        doc! { "key": { "when2": 1 }, "name": "ttl", "expireAfterSeconds": 3600 },
        doc! { "key": { "a": "hashed" }, "name": "a_hashed" },
        doc! { "key": { "_id": "hashed" }, "name": "_id_hashed" },
        doc! { "key": { "t": "text", "b": "text" }, "name": "text", "weights": { "t": 5, "b": 2 }, "default_language": "french", "language_override": "idioma", "textIndexVersion": 2 },
        doc! { "key": { "loc": "2dsphere" }, "name": "sphere", "2dsphereIndexVersion": 2 },
        doc! { "key": { "xy": "2d" }, "name": "flat", "bits": 20, "min": -200.0, "max": 200.0 },
        doc! { "key": { "$**": 1 }, "name": "wildcard", "wildcardProjection": { "w": 1 } },
        doc! { "key": { "w.x": 1 }, "name": "hidden", "hidden": true },
        doc! { "key": { "w.y": 1 }, "name": "multikey" },
        doc! { "key": { "a": 1, "b": "hashed" }, "name": "compound hashed" },
        doc! { "key": { "w.q": 1 }, "name": "empty partial", "partialFilterExpression": {} },
        doc! { "key": { "b": 1 }, "name": "collated", "collation": { "locale": "de", "strength": 2 } },
        doc! { "key": { "odd": -0.5 }, "name": "odd direction" },
    ];
    database.run_command(doc! { "createIndexes": "indexed", "indexes": indexes }).await.unwrap();
    // Versions that today's servers still hold, and documents that a TTL index would delete at once.
    for version in [1, 3] {
        let collection = format!("index_version_{version}");
        database.collection::<Document>(&collection).insert_one(doc! { "_id": 1, "t": "text", "loc": [1, 2] }).await.unwrap();
        let indexes = vec![
            doc! { "key": { "loc": "2dsphere" }, "name": "sphere", "2dsphereIndexVersion": version },
            doc! { "key": { "t": "text" }, "name": "text", "textIndexVersion": version },
        ];
        database.run_command(doc! { "createIndexes": collection, "indexes": indexes }).await.unwrap();
    }
    let expired = (0..50).map(|number| doc! { "_id": number, "when": mongo_core::bson::DateTime::from_millis(0) });
    database.collection::<Document>("expired").insert_many(expired).await.unwrap();
    let ttl = vec![doc! { "key": { "when": 1 }, "name": "at once", "expireAfterSeconds": 1 }];
    database.run_command(doc! { "createIndexes": "expired", "indexes": ttl }).await.unwrap();
}

/// Case 24: GridFS; and a second database with stored JavaScript.
async fn other_databases(deployment: &Deployment) {
    use futures_util::io::AsyncWriteExt as _;
    let bucket = deployment.database("files").gridfs_bucket(None);
    let mut upload = bucket.open_upload_stream("big file.bin").await.unwrap();
    upload.write_all(&(0..3_000_000_u32).map(|number| (number % 253) as u8).collect::<Vec<_>>()).await.unwrap();
    upload.close().await.unwrap();
    let second = deployment.database("Second-DB_2");
    second
        .collection::<Document>("things")
        .insert_many((0..1000).map(|number| doc! { "_id": number, "reference": number * 2 }))
        .await
        .unwrap();
    second
        .collection::<Document>("system.js")
        .insert_one(doc! { "_id": "f", "value": Bson::JavaScriptCode("function(){}".into()) })
        .await
        .unwrap();
}
