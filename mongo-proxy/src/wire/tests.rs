//! Messages as drivers write them, whole and in pieces, and all that is none.

use std::time::Duration;

use bson::{Bson, Document, doc, oid::ObjectId, spec::BinarySubtype};
use proptest::prelude::*;

use super::{
    compression::{self, Compressor},
    header::{HEADER, Header, LONGEST, Opcode},
    scan::{CHECKSUM_PRESENT, EXHAUST_ALLOWED, MORE_TO_COME, Scan},
    *,
};

fn bytes_of(document: &Document) -> Vec<u8> {
    document.to_vec().unwrap()
}

/// A document with a value of every kind.
fn everything() -> Document {
    doc! {
        "double": 1.5,
        "text": "wörld",
        "document": { "within": { "it": [1, "two", { "three": 3_i64 }] } },
        "binary": bson::Binary { subtype: BinarySubtype::Generic, bytes: vec![1, 2, 3] },
        "old": bson::Binary { subtype: BinarySubtype::BinaryOld, bytes: vec![1, 2, 3] },
        "undefined": Bson::Undefined,
        "id": ObjectId::from_bytes([7; 12]),
        "is": true,
        "at": bson::DateTime::from_millis(1),
        "null": Bson::Null,
        "code": Bson::JavaScriptCode("f()".to_owned()),
        "symbol": Bson::Symbol("s".to_owned()),
        "scope": Bson::JavaScriptCodeWithScope(bson::JavaScriptCodeWithScope { code: "f()".to_owned(), scope: doc! { "x": 1 } }),
        "i32": 1,
        "ts": bson::Timestamp { time: 1, increment: 2 },
        "i64": 2_i64,
        "decimal": "1.5".parse::<bson::Decimal128>().unwrap(),
        "least": Bson::MinKey,
        "greatest": Bson::MaxKey,
        "regex": bson::Regex { pattern: bson::cstr!("^a").into(), options: bson::cstr!("i").into() },
    }
}

/// A message of a body and sequences, with a checksum if the flags say so.
fn message(flags: u32, body: &Document, sequences: &[(&str, Vec<Document>)]) -> Vec<u8> {
    let mut inner = flags.to_le_bytes().to_vec();
    inner.push(0);
    inner.extend(bytes_of(body));
    for (name, documents) in sequences {
        let documents: Vec<u8> = documents.iter().flat_map(bytes_of).collect();
        inner.push(1);
        inner.extend(i32::try_from(4 + name.len() + 1 + documents.len()).unwrap().to_le_bytes());
        inner.extend(name.as_bytes());
        inner.push(0);
        inner.extend(documents);
    }
    let checksum = if flags & CHECKSUM_PRESENT == 0 { 0 } else { 4 };
    let header = Header { length: HEADER + inner.len() + checksum, request_id: 7, response_to: 0, opcode: Opcode::Message };
    let mut message = Vec::new();
    header.write(&mut message);
    message.extend(inner);
    if checksum > 0 {
        let crc = crc::Crc::<u32>::new(&crc::CRC_32_ISCSI).checksum(&message);
        message.extend(crc.to_le_bytes());
    }
    message
}

fn insert(flags: u32) -> Vec<u8> {
    let body = doc! { "insert": "orders", "$db": "shop", "extra": everything() };
    message(flags, &body, &[("documents", vec![everything(), doc! {}, doc! { "_id": 2 }])])
}

/// Checks a message that comes in pieces of so many bytes.
fn scanned(message: &[u8], piece: usize) -> Result<Scan, Malformed> {
    let header = Header::read(message.first_chunk().ok_or(Malformed::Length)?)?;
    let mut scan = Scan::new(header);
    let mut checked = HEADER;
    let mut there = HEADER;
    while !scan.is_complete() {
        if there >= message.len() {
            return Err(Malformed::Bounds);
        }
        there = (there + piece).min(message.len());
        checked += scan.advance(&message[checked..there])?;
    }
    if checked == message.len() { Ok(scan) } else { Err(Malformed::Bounds) }
}

fn error(message: &[u8]) -> Option<Malformed> {
    scanned(message, message.len()).err()
}

#[test]
fn a_message_is_read_whole_and_in_pieces_of_any_size() {
    for flags in [0, CHECKSUM_PRESENT, MORE_TO_COME, EXHAUST_ALLOWED, 1 << 30] {
        let message = insert(flags);
        for piece in [1, 2, 3, 7, 64, 1000, message.len()] {
            let scan = scanned(&message, piece).unwrap();
            assert_eq!(scan.flags(), flags);
            let body = &message[scan.body().unwrap()];
            let command = crate::command::Command::read(body, None).unwrap();
            assert_eq!((command.name, command.database, command.collection()), ("insert", "shop", Some("orders")));
        }
    }
}

#[test]
fn a_sequence_may_come_before_the_body() {
    let body = bytes_of(&doc! { "update": "c", "$db": "d" });
    let whole = message(0, &doc! {}, &[("updates", vec![doc! { "q": {} }])]);
    // Without the empty body, and with another at the end.
    let mut turned = whole[..HEADER + 4].to_vec();
    turned.extend(&whole[HEADER + 4 + 1 + 5..]);
    turned.push(0);
    turned.extend(&body);
    let length = i32::try_from(turned.len()).unwrap();
    turned[..4].copy_from_slice(&length.to_le_bytes());
    let scan = scanned(&turned, 5).unwrap();
    assert_eq!(turned[scan.body().unwrap()], body);
}

#[test]
fn what_is_no_message_is_told_apart() {
    let good = insert(0);
    let with = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut message = good.clone();
        change(&mut message);
        error(&message)
    };
    let number = |message: &mut Vec<u8>, at: usize, number: i32| message[at..at + 4].copy_from_slice(&number.to_le_bytes());
    for length in [-1, 0, 15, i32::MIN, i32::MAX, i32::try_from(LONGEST).unwrap() + 1] {
        assert_eq!(with(&|message| number(message, 0, length)), Some(Malformed::Length), "{length}");
    }
    for opcode in [0, 2002, 2005, 2010, -1] {
        assert_eq!(with(&|message| number(message, 12, opcode)), Some(Malformed::Opcode));
    }
    for flag in 2..16 {
        assert_eq!(with(&|message| number(message, HEADER, 1 << flag)), Some(Malformed::Flags));
    }
    assert_eq!(with(&|message| message[HEADER + 4] = 2), Some(Malformed::Section));
    // The body's length.
    for length in [-1, 0, 4, 1 << 24, i32::MAX] {
        assert_eq!(with(&|message| number(message, HEADER + 5, length)), Some(Malformed::Bounds), "{length}");
    }
    let empty = || doc! { "ping": 1, "$db": "admin" };
    assert_eq!(error(&message(0, &empty(), &[("a", vec![]), ("a", vec![])])), Some(Malformed::Section));
    assert_eq!(error(&message(0, &empty(), &[("", vec![])])), Some(Malformed::Section));
    let long = "x".repeat(100);
    assert_eq!(error(&message(0, &empty(), &[(&long, vec![])])), Some(Malformed::Section));
    let names: Vec<String> = (0..20).map(|number| number.to_string()).collect();
    let many: Vec<(&str, Vec<Document>)> = names.iter().map(|name| (name.as_str(), vec![])).collect();
    assert_eq!(error(&message(0, &empty(), &many)), Some(Malformed::Section));
    // Two bodies, and none.
    let mut two = message(0, &empty(), &[]);
    two.push(0);
    two.extend(bytes_of(&empty()));
    let length = i32::try_from(two.len()).unwrap();
    number(&mut two, 0, length);
    assert_eq!(error(&two), Some(Malformed::Section));
    let mut none = message(0, &empty(), &[])[..HEADER + 4].to_vec();
    number(&mut none, 0, 20);
    assert_eq!(error(&none), Some(Malformed::Bounds));
    let mut wrong = insert(CHECKSUM_PRESENT);
    *wrong.last_mut().unwrap() ^= 1;
    assert_eq!(error(&wrong), Some(Malformed::Checksum));
}

/// Whatever stands where a length may stand, also where none does.
#[test]
fn with_any_number_anywhere_a_message_is_read_or_refused_the_same_in_any_pieces() {
    let body = doc! { "insert": "c", "$db": "d", "all": everything() };
    let good = message(
        0,
        &body,
        &[("documents", vec![doc! { "_id": 1, "b": bson::Binary { subtype: BinarySubtype::Generic, bytes: vec![0; 9] } }])],
    );
    let mut refused = 0;
    for at in HEADER..good.len() - 3 {
        let before = i32::from_le_bytes(*good[at..].first_chunk().unwrap());
        let near = [-5, -4, -1, 1, 4, 5].map(|by| before.wrapping_add(by));
        for number in [i32::MIN, -1, 0, 1, 3, 4, 5, 1 << 24, i32::MAX].into_iter().chain(near) {
            let mut changed = good.clone();
            changed[at..at + 4].copy_from_slice(&number.to_le_bytes());
            let at_once = scanned(&changed, changed.len()).map(|scan| scan.body());
            let in_pieces = scanned(&changed, 3).map(|scan| scan.body());
            assert_eq!(at_once.is_ok(), in_pieces.is_ok(), "{number} at {at}");
            match at_once {
                Ok(body) => {
                    assert_eq!(walk(bson::RawDocument::from_bytes(&changed[body.unwrap()]).unwrap()), Ok(()), "{number} at {at}")
                }
                Err(_) => refused += 1,
            }
        }
    }
    assert!(refused > 1000, "{refused}");
}

#[test]
fn documents_are_within_each_other_only_so_often() {
    let nested = |depth: usize| {
        let mut document = doc! {};
        for _ in 1..depth {
            document = doc! { "d": document };
        }
        bytes_of(&document)
    };
    assert_eq!(bson_scan::check(&nested(bson_scan::DEEPEST + 1)), Ok(()));
    assert_eq!(bson_scan::check(&nested(bson_scan::DEEPEST + 2)), Err(Malformed::Depth));
}

fn compressed(id: u8, opcode: i32, length: i32, bytes: &[u8]) -> (Header, Vec<u8>) {
    let mut body = opcode.to_le_bytes().to_vec();
    body.extend(length.to_le_bytes());
    body.push(id);
    body.extend(bytes);
    (Header { length: HEADER + body.len(), request_id: 9, response_to: 3, opcode: Opcode::Compressed }, body)
}

fn deflated(compressor: Compressor, bytes: &[u8]) -> Vec<u8> {
    use std::io::Write as _;
    match compressor {
        Compressor::Noop => bytes.to_vec(),
        Compressor::Snappy => snap::raw::Encoder::new().compress_vec(bytes).unwrap(),
        Compressor::Zlib => {
            let mut encoder = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::fast());
            encoder.write_all(bytes).unwrap();
            encoder.finish().unwrap()
        }
        Compressor::Zstd => zstd::encode_all(bytes, 1).unwrap(),
    }
}

#[test]
fn a_compressed_message_is_one_of_exactly_the_length_that_it_says() {
    let message = insert(0);
    let inner = &message[HEADER..];
    let length = i32::try_from(inner.len()).unwrap();
    for compressor in Compressor::ALL {
        let bytes = deflated(compressor, inner);
        let inflate = |id, opcode, length: i32, bytes: &[u8]| {
            let (header, body) = compressed(id, opcode, length, bytes);
            compression::inflate(header, &body)
        };
        let (header, inflated) = inflate(compressor.id(), 2013, length, &bytes).unwrap();
        assert_eq!((header.request_id, header.opcode, &inflated[HEADER..]), (9, Opcode::Message, inner));
        scanned(&inflated, inflated.len()).unwrap();
        for wrong in [0, 1, length - 1, length + 1, i32::MAX, -1, 48_000_000] {
            assert_eq!(
                inflate(compressor.id(), 2013, wrong, &bytes).err(),
                Some(Malformed::Compression),
                "{compressor:?} {wrong}"
            );
        }
        // Compressed twice, and a legacy message.
        for opcode in [2012, 2004, 1, 0] {
            assert_eq!(inflate(compressor.id(), opcode, length, &bytes).err(), Some(Malformed::Compression));
        }
        assert_eq!(inflate(4, 2013, length, &bytes).err(), Some(Malformed::Compression));
        if compressor != Compressor::Noop {
            assert_eq!(inflate(compressor.id(), 2013, length, &bytes[..bytes.len() / 2]).err(), Some(Malformed::Compression));
        }
    }
    let (header, _) = compressed(1, 2013, 0, &[]);
    assert_eq!(compression::inflate(header, &[1, 2, 3]).err(), Some(Malformed::Bounds));
}

#[test]
fn of_a_bomb_no_more_is_inflated_than_it_says() {
    struct Zeros(usize);
    impl std::io::Read for Zeros {
        fn read(&mut self, to: &mut [u8]) -> std::io::Result<usize> {
            self.0 += to.len();
            to.fill(0);
            Ok(to.len())
        }
    }
    let (mut endless, mut inflated) = (Zeros(0), Vec::new());
    compression::read_exactly(&mut endless, 1000, &mut inflated).unwrap();
    assert_eq!((endless.0, inflated.len()), (1001, 1001));
    let zeros = vec![0; 1 << 26];
    for compressor in [Compressor::Zlib, Compressor::Zstd, Compressor::Snappy] {
        let (header, body) = compressed(compressor.id(), 2013, 1000, &deflated(compressor, &zeros));
        assert_eq!(compression::inflate(header, &body).err(), Some(Malformed::Compression));
    }
}

#[test]
fn a_legacy_query_is_only_a_command_of_admin() {
    let query = |name: &[u8], document: &[u8]| {
        let mut inner = vec![0; 4];
        inner.extend(name);
        inner.extend([0, 0, 0, 0, 255, 255, 255, 255]);
        inner.extend(document);
        let header = Header { length: HEADER + inner.len(), request_id: 1, response_to: 0, opcode: Opcode::Query };
        let mut message = Vec::new();
        header.write(&mut message);
        message.extend(inner);
        message
    };
    let hello = bytes_of(&doc! { "isMaster": 1, "helloOk": true });
    let message = query(b"admin.$cmd\0", &hello);
    assert_eq!(message[query::check(&message).unwrap()], hello);
    assert_eq!(query::check(&query(b"shop.orders\0", &hello)), Err(Malformed::Opcode));
    assert_eq!(query::check(&query(b"admin.$cmd\0", &hello[..4])), Err(Malformed::Bounds));
    let mut twice = hello.clone();
    twice.extend(&hello);
    assert_eq!(query::check(&query(b"admin.$cmd\0", &twice)), Err(Malformed::Bounds));
    assert_eq!(query::check(&message[..20]), Err(Malformed::Opcode));
}

#[test]
fn a_refusal_is_a_reply_in_the_way_of_the_request() {
    for opcode in [Opcode::Message, Opcode::Compressed, Opcode::Query] {
        let request = Header { length: 100, request_id: 42, response_to: 0, opcode };
        let reply = refusal::malformed(request, Malformed::Checksum);
        let header = Header::read(reply.first_chunk().unwrap()).unwrap();
        assert_eq!((header.length, header.response_to), (reply.len(), 42));
        let at = if opcode == Opcode::Query { 36 } else { 21 };
        assert_eq!(header.opcode, if opcode == Opcode::Query { Opcode::Reply } else { Opcode::Message });
        let document = Document::from_reader(&reply[at..]).unwrap();
        assert_eq!((document.get_f64("ok").unwrap(), document.get_i32("code").unwrap()), (0.0, 288));
    }
}

/// Any document.
fn documents() -> impl Strategy<Value = Document> {
    let leaf = prop_oneof![
        any::<i32>().prop_map(Bson::Int32),
        any::<f64>().prop_map(Bson::Double),
        ".{0,12}".prop_map(Bson::String),
        any::<bool>().prop_map(Bson::Boolean),
        proptest::collection::vec(any::<u8>(), 0..20)
            .prop_map(|bytes| Bson::Binary(bson::Binary { subtype: BinarySubtype::Generic, bytes })),
        Just(Bson::Null),
    ];
    let value = leaf.prop_recursive(4, 32, 5, |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..5).prop_map(Bson::Array),
            proptest::collection::hash_map("[a-z]{0,6}", inner, 0..5)
                .prop_map(|fields| Bson::Document(fields.into_iter().collect())),
        ]
    });
    proptest::collection::hash_map("[a-z$]{1,8}", value, 0..6).prop_map(|fields| fields.into_iter().collect())
}

proptest! {
    /// What is written is read, however it is cut; and with one byte changed it is read or refused, and nothing else.
    #[test]
    fn any_message_is_read_in_any_pieces_and_any_change_of_it_is_read_or_refused(
        body in documents(),
        sequence in proptest::collection::vec(documents(), 0..4),
        has_checksum: bool,
        piece in 1_usize..200,
        changed: prop::sample::Index,
        to: u8,
    ) {
        let mut whole = message(u32::from(has_checksum), &body, &[("documents", sequence)]);
        prop_assert!(scanned(&whole, piece).is_ok());
        let at = changed.index(whole.len());
        let before = std::mem::replace(&mut whole[at], to);
        let pieces = scanned(&whole, piece).map(|scan| (scan.flags(), scan.body()));
        let at_once = scanned(&whole, whole.len()).map(|scan| (scan.flags(), scan.body()));
        prop_assert_eq!(pieces.is_ok(), at_once.is_ok(), "it does not depend on the pieces");
        // A checksum that was taken away is no part of the message any more.
        if has_checksum && before != to && at >= HEADER && whole[HEADER] & 1 == 1 {
            prop_assert!(at_once.is_err());
        }
    }

    /// What is taken for a document can be walked through by a parser that knows nothing of the check.
    #[test]
    fn what_passes_as_a_document_is_one(document in documents(), changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..3)) {
        let mut bytes = bytes_of(&document);
        for (at, to) in &changes {
            let at = at.index(bytes.len());
            bytes[at] = *to;
        }
        if bson_scan::check(&bytes).is_ok() {
            prop_assert_eq!(walk(bson::RawDocument::from_bytes(&bytes).unwrap()), Ok(()));
        } else {
            prop_assert!(!changes.is_empty());
        }
    }

    /// Random bytes are read or refused.
    #[test]
    fn random_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _read_or_refused = scanned(&bytes, 10);
        let _read_or_refused = bson_scan::check(&bytes);
        let _read_or_refused = query::check(&bytes);
        for id in 0..5 {
            let (header, body) = compressed(id, 2013, 100, &bytes);
            let _read_or_refused = compression::inflate(header, &body);
        }
    }
}

/// Walks through all of a document, as far as its text is UTF-8: that is somebody else's business.
fn walk(document: &bson::RawDocument) -> Result<(), String> {
    let is_text = |error: &bson::error::Error| error.to_string().contains("UTF-8");
    for element in document.iter_elements() {
        let element = match element {
            Err(error) if is_text(&error) => return Ok(()),
            element => element.map_err(|error| error.to_string())?,
        };
        match element.value() {
            Ok(bson::RawBsonRef::Document(inner)) => walk(inner)?,
            Ok(bson::RawBsonRef::Array(inner)) => {
                walk(bson::RawDocument::from_bytes(inner.as_bytes()).map_err(|error| error.to_string())?)?;
            }
            Err(error) if !is_text(&error) => return Err(error.to_string()),
            _ => {}
        }
    }
    Ok(())
}

#[test]
fn a_document_is_changed_where_it_should_be_and_nowhere_else() {
    let mut body = doc! { "find": "c", "maxTimeMS": 3, "$db": "d" };
    body.extend(everything());
    let raw = bson::RawDocumentBuf::try_from(&body).unwrap();
    assert_eq!(rewrite::document(&raw, &[], &bson::RawDocumentBuf::new()).unwrap(), raw);
    let changed = rewrite::command(&raw, Some(Duration::from_millis(7)), None).unwrap();
    body.remove("maxTimeMS");
    body.insert("maxTimeMS", 7_i64);
    assert_eq!(Document::try_from(changed.as_ref()).unwrap(), body);
}
