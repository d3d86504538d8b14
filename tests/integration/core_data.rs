//! Everyday data access on a real server (C11, C12).

use std::{num::NonZeroUsize, time::Duration};

use futures_util::{StreamExt, TryStreamExt, stream};
use mongo_core::{
    CancellationToken, Error, ErrorKind, Result as CoreResult,
    bson::{Bson, Document, RawDocumentBuf, doc},
    data::{
        ChunkSettings, ClientExt, CollectionExt, DatabaseExt, GeoArea, GeoPoint, GridFsExt, InsertSettings, NearSettings,
        OnFailure, OnInvalidate, PutSettings, TextSearchSettings, WatchSettings, WatchStart, WithinSettings, run_concurrently,
    },
    filter::{FilterPolicy, Removal, clean_filter},
    mongodb::{
        BoxFuture, Collection, Database, IndexModel,
        change_stream::event::OperationType,
        options::{CollectionOptions, CreateCollectionOptions, FindOptions, IndexOptions, WriteConcern},
    },
};
use mongo_testkit::TestDeployment;

use crate::support::under_way;

type TestResult = Result<(), Box<dyn std::error::Error>>;

async fn database(prefix: &str) -> Result<Database, Box<dyn std::error::Error>> {
    let client = mongo_testkit::shared().await?.client().await?;
    Ok(client.database(&mongo_testkit::unique_name(prefix)))
}

async fn unique_index(collection: &Collection<Document>, field: &str) -> TestResult {
    let options = IndexOptions::builder().unique(true).build();
    collection.create_index(IndexModel::builder().keys(doc! { field: 1 }).options(options).build()).await?;
    Ok(())
}

fn kind<T>(result: CoreResult<T>) -> Option<ErrorKind> {
    result.err().map(|error| error.kind())
}

fn context(error: &Error, wanted: &str) -> Option<String> {
    error.context().find(|(key, _)| *key == wanted).map(|(_, value)| value.to_owned())
}

// ---- batched insert

#[tokio::test(flavor = "multi_thread")]
async fn a_million_documents_go_in_with_one_call_and_come_out_in_chunks() -> TestResult {
    let database = database("million").await?;
    let numbers = database.collection::<Document>("numbers");
    let documents = (0..1_000_000).map(|n| doc! { "_id": n, "even": n % 2 == 0 });
    let report = numbers.insert_batched(documents, InsertSettings::unordered()).await?;
    assert_eq!((report.inserted, report.failed), (1_000_000, 0));
    assert_eq!(numbers.estimated_document_count().await?, 1_000_000);

    let raw = numbers.clone_with_type::<RawDocumentBuf>();
    let mut chunks = raw.find_chunks(doc! {}, ChunkSettings::default().with_documents(10_000));
    let mut read = 0;
    while let Some(chunk) = chunks.try_next().await? {
        assert!(chunk.len() <= 10_000);
        read += chunk.len();
    }
    assert_eq!(read, 1_000_000);
    database.drop().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unordered_insert_goes_on_behind_failures_and_names_each() -> TestResult {
    let database = database("unordered").await?;
    let users = database.collection::<Document>("users");
    unique_index(&users, "email").await?;
    // Every seventh e-mail address is taken already, and the batches do not end where the failures are.
    users.insert_one(doc! { "_id": -1, "email": -1 }).await?;
    let documents = (0..100).map(|n| doc! { "_id": n, "email": if n % 7 == 6 { -1 } else { n } });
    let settings = InsertSettings::unordered().with_batch_documents(9).with_in_flight(3).with_kept_failures(5);
    let report = users.insert_batched(documents, settings).await?;
    assert_eq!((report.inserted, report.failed), (86, 14));
    assert_eq!(report.failures.len(), 5);
    assert!(report.failures.iter().all(|failure| failure.index % 7 == 6));
    assert_eq!(report.failures[0].code, Some(11000));
    assert_eq!(report.failures[0].message, "another document has the same key in the unique index email_1");
    assert_eq!(report.stopped_at, None);
    assert_eq!(users.count_documents(doc! {}).await?, 87);
    assert_eq!(kind(report.into_result()), Some(ErrorKind::Rejected));
    database.drop().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_ordered_insert_stops_at_the_first_failure() -> TestResult {
    let database = database("ordered").await?;
    for batch in [1, 4, 25, 26, 1000] {
        let items = database.collection::<Document>(&format!("items_{batch}"));
        items.insert_one(doc! { "_id": 25 }).await?;
        let documents = (0..100).map(|n| doc! { "_id": n });
        let report = items.insert_batched(documents, InsertSettings::default().with_batch_documents(batch)).await?;
        assert_eq!((report.inserted, report.failed, report.stopped_at), (25, 1, Some(25)), "batches of {batch}");
        assert_eq!(items.count_documents(doc! { "_id": { "$gt": 25 } }).await?, 0);
        assert_eq!(items.count_documents(doc! {}).await?, 26);
    }
    database.drop().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_document_that_no_server_takes_fails_alone() -> TestResult {
    let database = database("too_large").await?;
    let files = database.collection::<Document>("files");
    let documents = || (0..6).map(|n| doc! { "_id": n, "data": "x".repeat(if n == 3 { 17 << 20 } else { 10 }) });
    let report = files.insert_batched(documents(), InsertSettings::unordered()).await?;
    assert_eq!((report.inserted, report.failed, report.failures[0].index), (5, 1, 3));
    files.delete_many(doc! {}).await?;
    let report = files.insert_batched(documents(), InsertSettings::default()).await?;
    assert_eq!((report.inserted, report.stopped_at), (3, Some(3)));
    assert_eq!(files.count_documents(doc! {}).await?, 3);
    database.drop().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_validator_refuses_documents_and_not_the_insert() -> TestResult {
    let database = database("validator").await?;
    let options = CreateCollectionOptions::builder().validator(doc! { "age": { "$type": "int" } }).build();
    database.create_collection("people").with_options(options).await?;
    let people = database.collection::<Document>("people");
    let documents = [doc! { "age": 1 }, doc! { "age": "two" }, doc! { "age": 3 }];
    let report = people.insert_batched(&documents, InsertSettings::unordered()).await?;
    assert_eq!((report.inserted, report.failed), (2, 1));
    assert_eq!((report.failures[0].code, report.failures[0].kind), (Some(121), ErrorKind::Rejected));
    database.drop().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_concern_that_is_not_satisfied_is_an_error_with_the_numbers() -> TestResult {
    let database = database("concern").await?;
    let mut concern = WriteConcern::nodes(3);
    concern.w_timeout = Some(Duration::from_millis(300));
    let options = CollectionOptions::builder().write_concern(concern).build();
    let items = database.collection_with_options::<Document>("items", options);
    let documents = (0..10).map(|n| doc! { "_id": n });
    let error = items.insert_batched(documents, InsertSettings::default()).await.expect_err("one member is not three");
    // The set has one member, so that no waiting would help.
    assert_eq!(error.kind(), ErrorKind::InvalidInput, "{}", error.report());
    assert_eq!(context(&error, "inserted").as_deref(), Some("10"));
    assert_eq!(items.count_documents(doc! {}).await?, 10);
    database.drop().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_fails_ends_the_insert_with_its_own_error() -> TestResult {
    let database = database("stream").await?;
    let items = database.collection::<Document>("items");
    let source = stream::iter(0..100)
        .map(|n| if n == 40 { Err(Error::new(ErrorKind::CorruptData, "line 40 is no JSON")) } else { Ok(doc! { "_id": n }) });
    let settings = InsertSettings::default().with_batch_documents(10);
    let error = items.insert_stream(source, settings).await.expect_err("the source fails");
    assert_eq!(error.kind(), ErrorKind::CorruptData);
    assert_eq!(context(&error, "inserted").as_deref(), Some("40"));
    assert_eq!(items.count_documents(doc! {}).await?, 40);

    let copy = database.collection::<Document>("copy");
    let documents = items.find(doc! {}).await?.map_err(Error::from);
    assert_eq!(copy.insert_stream(documents, InsertSettings::unordered()).await?.inserted, 40);
    database.drop().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_inserter_says_how_far_it_came() -> TestResult {
    let database = database("cancel").await?;
    let items = database.collection::<Document>("items");
    let cancel = CancellationToken::new();
    let settings = InsertSettings::unordered().with_batch_documents(10);
    let mut inserter = items.batch_inserter(settings)?.with_cancellation(cancel.clone());
    for n in 0..25 {
        assert!(inserter.push(&doc! { "_id": n }).await?.is_continue());
    }
    cancel.cancel();
    let error = inserter.finish().await.expect_err("it was cancelled");
    assert_eq!(error.kind(), ErrorKind::Cancelled);
    assert_eq!(context(&error, "inserted").as_deref(), Some("20"));
    assert_eq!(items.count_documents(doc! {}).await?, 20);
    database.drop().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_whose_connection_is_lost_is_inserted_once() -> TestResult {
    let deployment = TestDeployment::replica_set(1).start().await?;
    let items = deployment.client().await?.database("lost").collection::<Document>("items");
    items.insert_one(doc! { "_id": -1 }).await?;
    let data = doc! { "failCommands": ["insert"], "closeConnection": true };
    deployment.fail_command(0, doc! { "times": 1 }, data).await?;
    // No `_id` here: a batch that is sent twice would be in twice.
    let documents = (0..1000).map(|n| doc! { "n": n });
    let report = items.insert_batched(documents, InsertSettings::unordered().with_batch_documents(100)).await?;
    assert_eq!(report.inserted, 1000);
    assert_eq!(items.count_documents(doc! { "n": { "$exists": true } }).await?, 1000);
    Ok(())
}

// ---- streamed reads

#[tokio::test(flavor = "multi_thread")]
async fn chunks_are_full_but_the_last_and_keep_the_order() -> TestResult {
    let database = database("chunks").await?;
    let items = database.collection::<Document>("items");
    items.insert_batched((0..1000).map(|n| doc! { "_id": n }), InsertSettings::unordered()).await?;
    let newest_first = FindOptions::builder().sort(doc! { "_id": -1 }).build();
    let settings = ChunkSettings::default().with_documents(300);
    let chunks: Vec<Vec<Document>> = items.find_chunks_with(doc! {}, newest_first, settings.clone()).try_collect().await?;
    assert_eq!(chunks.iter().map(Vec::len).collect::<Vec<_>>(), [300, 300, 300, 100]);
    let ids: Vec<i32> = chunks.iter().flatten().map(|item| item.get_i32("_id")).collect::<Result<_, _>>()?;
    assert_eq!(ids, (0..1000).rev().collect::<Vec<_>>());

    // A document like these has 14 bytes.
    let by_bytes: Vec<Vec<Document>> =
        items.find_chunks(doc! {}, ChunkSettings::default().with_bytes(14 * 70)).try_collect().await?;
    assert_eq!(by_bytes.iter().map(Vec::len).collect::<Vec<_>>(), [[70; 14].as_slice(), &[20]].concat());

    let nothing: Vec<Vec<Document>> = items.find_chunks(doc! { "_id": -1 }, settings.clone()).try_collect().await?;
    assert!(nothing.is_empty());

    let pipeline = [doc! { "$match": { "_id": { "$lt": 450 } } }, doc! { "$project": { "_id": 0, "n": "$_id" } }];
    let projected: Vec<Vec<Document>> = items.aggregate_chunks(pipeline, settings).try_collect().await?;
    assert_eq!(projected.iter().map(Vec::len).collect::<Vec<_>>(), [300, 150]);
    assert!(projected[0][0].contains_key("n"));
    database.drop().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_error_ends_a_streamed_read() -> TestResult {
    let deployment = TestDeployment::replica_set(1).start().await?;
    let items = deployment.client().await?.database("chunks").collection::<Document>("items");
    items.insert_batched((0..1000).map(|n| doc! { "_id": n }), InsertSettings::unordered()).await?;
    let mut chunks = items.find_chunks(doc! {}, ChunkSettings::default().with_documents(100));
    assert_eq!(chunks.try_next().await?.map(|chunk| chunk.len()), Some(100));
    let data = doc! { "failCommands": ["getMore"], "closeConnection": true };
    deployment.fail_command(0, doc! { "times": 1 }, data).await?;
    let mut error = None;
    let mut read = 100;
    while let Some(chunk) = chunks.next().await {
        assert!(error.is_none(), "nothing may come after an error");
        match chunk {
            Ok(chunk) => read += chunk.len(),
            Err(failure) => error = Some(failure),
        }
    }
    let error = error.ok_or("the lost connection must be told")?;
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert_eq!(context(&error, "documents read"), Some(read.to_string()));
    assert!(read < 1000);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_filter_is_the_streams_only_item() -> TestResult {
    let database = database("bad_filter").await?;
    let items = database.collection::<Document>("items");
    let mut chunks = items.find_chunks(doc! { "$nonsense": 1 }, ChunkSettings::default());
    assert_eq!(chunks.next().await.and_then(kind), Some(ErrorKind::InvalidInput));
    assert!(chunks.next().await.is_none());
    let mut chunks = items.find_chunks(doc! {}, ChunkSettings::default().with_documents(0));
    assert_eq!(chunks.next().await.and_then(kind), Some(ErrorKind::InvalidInput));
    Ok(())
}

// ---- text and places

#[tokio::test(flavor = "multi_thread")]
async fn text_search_ranks_by_score_and_leaves_documents_as_they_are() -> TestResult {
    let database = database("text").await?;
    let articles = database.collection::<Document>("articles");
    let error = articles.text_search("coffee", TextSearchSettings::default()).await.expect_err("there is no index");
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(error.to_string().contains("text index"), "{error}");

    articles.create_index(IndexModel::builder().keys(doc! { "body": "text" }).build()).await?;
    articles
        .insert_many([
            doc! { "_id": 1, "body": "coffee coffee coffee", "score": "its own field", "on": true },
            doc! { "_id": 2, "body": "a long text about tea in which coffee has one mention", "on": true },
            doc! { "_id": 3, "body": "nothing about it", "on": true },
            doc! { "_id": 4, "body": "coffee", "on": false },
        ])
        .await?;
    let settings = TextSearchSettings::default().with_filter(doc! { "on": true });
    let found = articles.text_search("coffee", settings.clone()).await?;
    assert_eq!(found.iter().map(|hit| hit.document.get_i32("_id")).collect::<Result<Vec<_>, _>>()?, [1, 2]);
    assert!(found[0].score > found[1].score);
    assert_eq!(found[0].document.get_str("score")?, "its own field");
    let best = articles.text_search("coffee", settings.clone().with_limit(1)).await?;
    assert_eq!(best.len(), 1);
    let strong = articles.text_search("coffee", settings.with_min_score(1.0)).await?;
    assert_eq!(strong.len(), 1);
    let without = articles.text_search("coffee -mention", TextSearchSettings::default()).await?;
    assert_eq!(without.len(), 2);
    assert_eq!(kind(articles.text_search(" ", TextSearchSettings::default()).await), Some(ErrorKind::InvalidInput));
    database.drop().await?;
    Ok(())
}

fn at(longitude: f64, latitude: f64) -> CoreResult<Document> {
    Ok(doc! { "_id": format!("{longitude},{latitude}"), "at": GeoPoint::new(longitude, latitude)?.to_geojson() })
}

async fn places(database: &Database, places: &[(f64, f64)]) -> Result<Collection<Document>, Box<dyn std::error::Error>> {
    let collection = database.collection::<Document>("places");
    collection.create_index(IndexModel::builder().keys(doc! { "at": "2dsphere" }).build()).await?;
    let documents = places.iter().map(|(longitude, latitude)| at(*longitude, *latitude)).collect::<CoreResult<Vec<_>>>()?;
    collection.insert_many(documents).await?;
    Ok(collection)
}

fn ids(found: &[Document]) -> Result<Vec<&str>, Box<dyn std::error::Error>> {
    let mut ids = found.iter().map(|place| place.get_str("_id")).collect::<Result<Vec<_>, _>>()?;
    ids.sort_unstable();
    Ok(ids)
}

#[tokio::test(flavor = "multi_thread")]
async fn near_returns_distances_in_metres_nearest_first() -> TestResult {
    let database = database("near").await?;
    let bare = database.collection::<Document>("bare");
    bare.insert_one(doc! { "x": 1 }).await?;
    let here = GeoPoint::new(0.0, 0.0)?;
    assert_eq!(kind(bare.near("at", here, NearSettings::default()).await), Some(ErrorKind::NotFound));

    // A degree along the equator is 111.3 km.
    let places = places(&database, &[(0.02, 0.0), (0.01, 0.0), (0.0, 0.05), (1.0, 0.0)]).await?;
    let found = places.near("at", here, NearSettings::default().with_max_distance_metres(10_000.0)).await?;
    assert_eq!(
        found.iter().map(|place| place.document.get_str("_id")).collect::<Result<Vec<_>, _>>()?,
        ["0.01,0", "0.02,0", "0,0.05"]
    );
    assert!((found[0].distance_metres - 1113.2).abs() < 1.0, "{}", found[0].distance_metres);
    assert_eq!(found[0].document.keys().collect::<Vec<_>>(), ["_id", "at"], "the distance is not left in the document");
    let ring = NearSettings::default().with_min_distance_metres(2_000.0).with_max_distance_metres(3_000.0);
    assert_eq!(places.near("at", here, ring).await?.len(), 1);
    assert_eq!(places.near("at", here, NearSettings::default().with_limit(2)).await?.len(), 2);
    database.drop().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wide_box_follows_the_parallels() -> TestResult {
    let database = database("box").await?;
    // A great circle from (10, 40) to (40, 40) is north of 41 in the middle.
    let places = places(&database, &[(25.0, 40.01), (25.0, 39.99), (25.0, 59.99), (25.0, 60.01), (9.9, 50.0)]).await?;
    let area = GeoArea::bounding_box(GeoPoint::new(10.0, 40.0)?, GeoPoint::new(40.0, 60.0)?)?;
    let found = places.within("at", &area, WithinSettings::default()).await?;
    assert_eq!(ids(&found)?, ["25,40.01", "25,59.99"]);
    database.drop().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn boxes_reach_the_poles_and_over_the_date_line() -> TestResult {
    let database = database("world").await?;
    let all = [(0.0, 90.0), (7.0, -90.0), (179.5, 3.0), (-179.5, 3.0), (0.0, 0.0), (120.0, 45.0), (3.0, 89.9)];
    let places = places(&database, &all).await?;
    let world = GeoArea::bounding_box(GeoPoint::new(-180.0, -90.0)?, GeoPoint::new(180.0, 90.0)?)?;
    assert_eq!(places.within("at", &world, WithinSettings::default()).await?.len(), all.len());
    let pacific = GeoArea::bounding_box(GeoPoint::new(179.0, 0.0)?, GeoPoint::new(-179.0, 10.0)?)?;
    assert_eq!(ids(&places.within("at", &pacific, WithinSettings::default()).await?)?, ["-179.5,3", "179.5,3"]);
    let arctic = GeoArea::bounding_box(GeoPoint::new(-10.0, 80.0)?, GeoPoint::new(10.0, 90.0)?)?;
    assert_eq!(ids(&places.within("at", &arctic, WithinSettings::default()).await?)?, ["3,89.9"]);
    database.drop().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn polygons_and_circles_select_what_is_inside() -> TestResult {
    let database = database("areas").await?;
    let places = places(&database, &[(1.0, 1.0), (3.0, 1.0), (0.001, 0.0)]).await?;
    let corners = [(0.5, 0.5), (2.0, 0.5), (1.0, 2.0)].map(|(longitude, latitude)| GeoPoint::new(longitude, latitude));
    let triangle = GeoArea::polygon(corners.into_iter().collect::<CoreResult<Vec<_>>>()?)?;
    assert_eq!(ids(&places.within("at", &triangle, WithinSettings::default()).await?)?, ["1,1"]);
    let circle = GeoArea::circle(GeoPoint::new(0.0, 0.0)?, 200.0)?;
    assert_eq!(ids(&places.within("at", &circle, WithinSettings::default()).await?)?, ["0.001,0"]);
    let mut chunks = places.find_chunks(circle.filter("at")?, ChunkSettings::default());
    assert_eq!(chunks.try_next().await?.map(|chunk| chunk.len()), Some(1));
    let crossed = [(0.0, 0.0), (10.0, 10.0), (10.0, 0.0), (0.0, 10.0)]
        .into_iter()
        .map(|(longitude, latitude)| GeoPoint::new(longitude, latitude))
        .collect::<CoreResult<Vec<_>>>()?;
    let result = places.within("at", &GeoArea::polygon(crossed)?, WithinSettings::default()).await;
    assert_eq!(kind(result), Some(ErrorKind::InvalidInput));
    database.drop().await?;
    Ok(())
}

// ---- files

/// Bytes that differ everywhere, so that a chunk out of place is seen.
fn noise(bytes: usize) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(7);
    (0..bytes).map(|_| random.u8(..)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn files_come_back_as_they_went_in() -> TestResult {
    let database = database("files").await?;
    let bucket = database.gridfs_bucket(None);
    for bytes in [0, 1, 255 * 1024 - 1, 255 * 1024, 255 * 1024 + 1, 5 << 20] {
        let content = noise(bytes);
        let settings = PutSettings::default().with_metadata(doc! { "kind": "noise" });
        let stored = bucket.put_file("noise.bin", &content, settings).await?;
        assert_eq!(stored.bytes, bytes as u64);
        assert_eq!(bucket.get_file(stored.id.clone()).await?, content, "{bytes} bytes");
        let info = bucket.file_info(stored.id).await?;
        assert_eq!((info.length, info.filename.as_deref()), (bytes as u64, Some("noise.bin")));
        assert_eq!(info.metadata, Some(doc! { "kind": "noise" }));
    }
    assert_eq!(bucket.files_named("noise.bin").await?.len(), 6);
    assert!(bucket.files_named("nobody.bin").await?.is_empty());
    assert_eq!(bucket.get_file_by_name("noise.bin").await?.len(), 5 << 20, "the newest revision");
    database.drop().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn files_are_streamed_both_ways() -> TestResult {
    let database = database("stream_files").await?;
    let bucket = database.gridfs_bucket(None);
    let content = noise((3 << 20) + 17);
    let settings = PutSettings::default().with_id("movie").with_chunk_bytes(10_000);
    let stored = bucket.put_file_from("movie.mkv", content.as_slice(), settings).await?;
    assert_eq!((stored.id, stored.bytes), (Bson::from("movie"), content.len() as u64));
    let chunks = database.collection::<Document>("fs.chunks").count_documents(doc! {}).await?;
    assert_eq!(chunks, (content.len() as u64).div_ceil(10_000));
    let mut out = Vec::new();
    assert_eq!(bucket.get_file_to("movie", &mut out).await?, content.len() as u64);
    assert!(out == content);
    database.drop().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_file_is_gone_with_its_chunks() -> TestResult {
    let database = database("delete_files").await?;
    let bucket = database.gridfs_bucket(None);
    let stored = bucket.put_file("a", &noise(600_000), PutSettings::default()).await?;
    bucket.delete_file(stored.id.clone()).await?;
    assert_eq!(database.collection::<Document>("fs.chunks").count_documents(doc! {}).await?, 0);
    assert_eq!(kind(bucket.get_file(stored.id.clone()).await), Some(ErrorKind::NotFound));
    assert_eq!(kind(bucket.file_info(stored.id.clone()).await), Some(ErrorKind::NotFound));
    assert_eq!(kind(bucket.delete_file(stored.id).await), Some(ErrorKind::NotFound));
    assert_eq!(kind(bucket.get_file_by_name("a").await), Some(ErrorKind::NotFound));
    database.drop().await?;
    Ok(())
}

/// Yields some bytes, then fails.
struct Failing(usize);

impl tokio::io::AsyncRead for Failing {
    fn poll_read(
        mut self: std::pin::Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
        buffer: &mut tokio::io::ReadBuf<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        if self.0 == 0 {
            return std::task::Poll::Ready(Err(std::io::Error::other("the disk is gone")));
        }
        let bytes = self.0.min(buffer.remaining());
        buffer.put_slice(&vec![1; bytes]);
        self.0 -= bytes;
        std::task::Poll::Ready(Ok(()))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_that_fails_leaves_nothing_behind() -> TestResult {
    let database = database("failed_upload").await?;
    let bucket = database.gridfs_bucket(None);
    let error = bucket.put_file_from("x", Failing(5 << 20), PutSettings::default()).await.expect_err("the reader fails");
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    assert!(error.report().contains("the disk is gone"));
    assert_eq!(database.collection::<Document>("fs.chunks").count_documents(doc! {}).await?, 0);
    assert_eq!(database.collection::<Document>("fs.files").count_documents(doc! {}).await?, 0);
    database.drop().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_id_that_is_taken_is_a_conflict_and_the_file_stays() -> TestResult {
    let database = database("file_conflict").await?;
    let bucket = database.gridfs_bucket(None);
    let content = noise(700_000);
    bucket.put_file("a", &content, PutSettings::default().with_id(1)).await?;
    let second = bucket.put_file("b", b"other", PutSettings::default().with_id(1)).await;
    assert_eq!(kind(second), Some(ErrorKind::Conflict));
    assert_eq!(bucket.get_file(1).await?, content);
    database.drop().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_chunk_is_corrupt_data() -> TestResult {
    let database = database("file_hole").await?;
    let bucket = database.gridfs_bucket(None);
    for missing in [0, 1, 2] {
        let stored = bucket.put_file("a", &noise(600_000), PutSettings::default()).await?;
        let chunks = database.collection::<Document>("fs.chunks");
        chunks.delete_one(doc! { "files_id": stored.id.clone(), "n": missing }).await?;
        assert_eq!(kind(bucket.get_file(stored.id).await), Some(ErrorKind::CorruptData), "chunk {missing}");
    }
    database.drop().await?;
    Ok(())
}

// ---- watching

/// The next change, or an error when there is none in time.
macro_rules! next {
    ($changes:expr) => {
        tokio::time::timeout(Duration::from_secs(20), $changes.next_change()).await?
    };
}

fn id_of(key: Option<&Document>) -> Option<i32> {
    key?.get_i32("_id").ok()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watcher_sees_what_happens_after_it_was_opened() -> TestResult {
    let database = database("watch").await?;
    let items = database.collection::<Document>("items");
    items.insert_one(doc! { "_id": 0 }).await?;
    let mut changes = items.watch_changes(WatchSettings::default()).await?;
    let first = changes.resume_token().ok_or("a stream has a token from the start")?;
    items.insert_one(doc! { "_id": 1 }).await?;
    items.delete_one(doc! { "_id": 1 }).await?;
    let change = next!(changes)?.ok_or("a change")?;
    assert_eq!((change.operation_type, id_of(change.document_key.as_ref())), (OperationType::Insert, Some(1)));
    let after_insert = changes.resume_token().ok_or("a token")?;
    assert_eq!(next!(changes)?.map(|change| change.operation_type), Some(OperationType::Delete));

    let again = WatchSettings::default().with_start(WatchStart::After(first));
    let mut again = items.watch_changes(again).await?;
    assert_eq!(next!(again)?.map(|change| change.operation_type), Some(OperationType::Insert));
    let rest = WatchSettings::default().with_start(WatchStart::After(after_insert));
    let mut rest = items.watch_changes(rest).await?;
    assert_eq!(next!(rest)?.map(|change| change.operation_type), Some(OperationType::Delete));

    let of_database = database.watch_changes(WatchSettings::default()).await?;
    // Other tests write to the same deployment.
    let ours = WatchSettings::default().with_pipeline([doc! { "$match": { "ns.db": database.name() } }]);
    let of_client = database.client().watch_changes(ours).await?;
    database.collection::<Document>("other").insert_one(doc! { "_id": 7 }).await?;
    for mut changes in [of_database, of_client] {
        assert_eq!(next!(changes)?.and_then(|change| id_of(change.document_key.as_ref())), Some(7));
    }
    database.drop().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_wait_loses_no_change() -> TestResult {
    let database = database("watch_select").await?;
    let items = database.collection::<Document>("items");
    let settings = WatchSettings::default().with_max_await_time(Duration::from_millis(50));
    let mut changes = items.watch_changes(settings).await?;
    let (written, mut writes) = tokio::sync::mpsc::unbounded_channel();
    let writer = {
        let items = items.clone();
        tokio::spawn(async move {
            for n in 0..50 {
                items.insert_one(doc! { "_id": n }).await?;
                // The wait for a change is dropped whenever there is a new one.
                let _ = written.send(n);
            }
            Ok::<(), Error>(())
        })
    };
    let mut dropped = 0;
    let mut seen = Vec::new();
    while seen.len() < 50 {
        tokio::select! {
            change = changes.next_change() => seen.extend(change?.and_then(|change| id_of(change.document_key.as_ref()))),
            Some(_) = writes.recv() => {
                dropped += 1;
                assert!(changes.resume_token().is_some());
            }
        }
    }
    assert_eq!(seen, (0..50).collect::<Vec<_>>());
    assert!(dropped > 0, "no wait was dropped");
    writer.await??;
    database.drop().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watcher_survives_more_failures_than_the_driver_does() -> TestResult {
    let deployment = TestDeployment::replica_set(1).start().await?;
    let items = deployment.client().await?.database("watch").collection::<Document>("items");
    items.insert_one(doc! { "_id": 0 }).await?;
    let mut changes = items.watch_changes(WatchSettings::default()).await?;
    items.insert_one(doc! { "_id": 1 }).await?;
    assert_eq!(next!(changes)?.and_then(|change| id_of(change.document_key.as_ref())), Some(1));
    let data = doc! { "failCommands": ["getMore", "aggregate"], "closeConnection": true };
    deployment.fail_command(0, doc! { "times": 7 }, data).await?;
    items.insert_many((2..5).map(|n| doc! { "_id": n })).await?;
    for wanted in 2..5 {
        assert_eq!(next!(changes)?.and_then(|change| id_of(change.document_key.as_ref())), Some(wanted));
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watcher_outlives_an_election() -> TestResult {
    let deployment = TestDeployment::replica_set(3).start().await?;
    let items = deployment.client().await?.database("watch").collection::<Document>("items");
    items.insert_one(doc! { "_id": 0 }).await?;
    let mut changes = items.watch_changes(WatchSettings::default()).await?;
    items.insert_one(doc! { "_id": 1 }).await?;
    assert_eq!(next!(changes)?.and_then(|change| id_of(change.document_key.as_ref())), Some(1));
    let watching =
        tokio::spawn(async move { (tokio::time::timeout(Duration::from_secs(60), changes.next_change()).await, changes) });
    deployment.member(deployment.primary().await?).kill()?;
    deployment.primary().await?;
    items.insert_one(doc! { "_id": 2 }).await?;
    let (change, _changes) = watching.await?;
    assert_eq!(change??.and_then(|change| id_of(change.document_key.as_ref())), Some(2));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_watcher_ends_and_keeps_its_token() -> TestResult {
    let database = database("watch_cancel").await?;
    let items = database.collection::<Document>("items");
    let cancel = CancellationToken::new();
    let mut changes = items.watch_changes(WatchSettings::default()).await?.with_cancellation(cancel.clone());
    let waiting = tokio::spawn(async move { (changes.next_change().await, changes) });
    under_way(database.client(), doc! { "op": "getmore", "ns": format!("{}.items", database.name()) }, &waiting).await;
    cancel.cancel();
    let (change, changes) = waiting.await?;
    assert!(change?.is_none());
    assert!(changes.resume_token().is_some());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drop_ends_a_watcher_or_not_as_it_was_told() -> TestResult {
    let database = database("watch_drop").await?;
    let items = database.collection::<Document>("items");
    items.insert_one(doc! { "_id": 0 }).await?;
    let mut ending = items.watch_changes(WatchSettings::default()).await?;
    let mut lasting = items.watch_changes(WatchSettings::default().with_on_invalidate(OnInvalidate::Reopen)).await?;
    items.drop().await?;
    items.insert_one(doc! { "_id": 1 }).await?;
    for changes in [&mut ending, &mut lasting] {
        assert_eq!(next!(changes)?.map(|change| change.operation_type), Some(OperationType::Drop));
        assert_eq!(next!(changes)?.map(|change| change.operation_type), Some(OperationType::Invalidate));
    }
    assert!(next!(ending)?.is_none());
    assert_eq!(next!(lasting)?.and_then(|change| id_of(change.document_key.as_ref())), Some(1));
    database.drop().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standalone_server_cannot_be_watched() -> TestResult {
    let deployment = TestDeployment::standalone().start().await?;
    let items = deployment.client().await?.database("watch").collection::<Document>("items");
    assert_eq!(kind(items.watch_changes(WatchSettings::default()).await), Some(ErrorKind::Unsupported));
    Ok(())
}

// ---- several at once, statistics, filters

#[tokio::test(flavor = "multi_thread")]
async fn different_operations_run_at_once_and_answer_in_order() -> TestResult {
    let database = database("concurrent").await?;
    let items = database.collection::<Document>("items");
    let limit = NonZeroUsize::new(50).ok_or("50 is not 0")?;
    let inserts = (0..500).map(|n| {
        let items = &items;
        async move { Ok::<_, Error>(items.insert_one(doc! { "_id": n }).await?.inserted_id) }
    });
    let inserted: Vec<Bson> =
        run_concurrently(limit, inserts, OnFailure::Continue).await.into_iter().collect::<CoreResult<_>>()?;
    assert_eq!(inserted, (0..500).map(Bson::Int32).collect::<Vec<_>>());

    let operations: Vec<BoxFuture<'_, CoreResult<u64>>> = vec![
        Box::pin(async { Ok(items.count_documents(doc! {}).await?) }),
        Box::pin(async {
            Ok(items.update_many(doc! { "_id": { "$lt": 10 } }, doc! { "$set": { "a": 1 } }).await?.modified_count)
        }),
        Box::pin(async {
            items.insert_one(doc! { "_id": 3 }).await?;
            Ok(1)
        }),
        Box::pin(async { Ok(database.collection_names().await?.len() as u64) }),
    ];
    let results = run_concurrently(limit, operations, OnFailure::Continue).await;
    let results: Vec<_> = results.into_iter().map(|result| result.map_err(|error| error.kind())).collect();
    assert_eq!(results, [Ok(500), Ok(10), Err(ErrorKind::Rejected), Ok(1)]);
    database.drop().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn statistics_count_documents_bytes_and_indexes() -> TestResult {
    let database = database("statistics").await?;
    let empty = DatabaseExt::statistics(&database).await?;
    assert_eq!((empty.collections, empty.documents), (0, 0));
    let items = database.collection::<Document>("items");
    assert_eq!(kind(items.statistics().await), Some(ErrorKind::NotFound));
    items.insert_batched((0..500).map(|n| doc! { "_id": n }), InsertSettings::unordered()).await?;
    unique_index(&items, "a.b").await.expect_err("many documents lack the field");
    items.create_index(IndexModel::builder().keys(doc! { "a": 1 }).build()).await?;
    let statistics = items.statistics().await?;
    assert_eq!((statistics.documents, statistics.data_bytes, statistics.shards), (500, 500 * 14, 1));
    assert_eq!(statistics.index_bytes.keys().collect::<Vec<_>>(), ["_id_", "a_1"]);
    assert_eq!(statistics.mean_document_bytes(), Some(14));
    assert!(!statistics.capped && statistics.capped_documents.is_none());

    let options = CreateCollectionOptions::builder().capped(true).size(4096_u64).max(10_u64).build();
    database.create_collection("ring").with_options(options).await?;
    let ring = database.collection::<Document>("ring").statistics().await?;
    assert_eq!((ring.capped, ring.capped_bytes, ring.capped_documents), (true, Some(4096), Some(10)));

    let view = CreateCollectionOptions::builder().view_on("items".to_owned()).pipeline(Vec::<Document>::new()).build();
    database.create_collection("view").with_options(view).await?;
    assert_eq!(kind(database.collection::<Document>("view").statistics().await), Some(ErrorKind::Unsupported));
    assert_eq!(database.collection_names().await?, ["items", "ring", "view"]);
    let whole = DatabaseExt::statistics(&database).await?;
    // Servers count the definition of the view as a document.
    assert!((500..=501).contains(&whole.documents) && whole.views == 1, "{whole:?}");
    database.drop().await?;
    Ok(())
}

/// A cleaned filter runs on a server, and what is taken out never reaches it.
#[tokio::test(flavor = "multi_thread")]
async fn cleaned_filters_run_and_match_what_they_say() -> TestResult {
    let database = database("filters").await?;
    let items = database.collection::<Document>("items");
    items.insert_many((0..10).map(|n| doc! { "_id": n, "n": n })).await?;
    let narrow = FilterPolicy::default();
    let relaxed = FilterPolicy::default().with_removal(Removal::Drop);
    for (filter, narrowed, dropped) in [
        (doc! { "n": { "$gte": 5 } }, 5, 5),
        (doc! { "n": { "$gte": 5 }, "$where": "true" }, 0, 5),
        (doc! { "$where": "true" }, 0, 0),
        (doc! { "$or": [{ "n": 1 }, { "$expr": true }] }, 1, 1),
        (doc! { "$nor": [{ "n": 1 }, { "$where": "false" }] }, 0, 9),
        (doc! { "n": { "$in": [1, 2], "$function": 1 } }, 0, 2),
        (doc! {}, 10, 10),
    ] {
        let cleaned = clean_filter(filter.clone(), &narrow)?;
        assert_eq!(items.count_documents(cleaned.filter).await?, narrowed, "{filter}");
        let cleaned = clean_filter(filter.clone(), &relaxed)?;
        assert_eq!(items.count_documents(cleaned.filter).await?, dropped, "{filter}");
    }
    database.drop().await?;
    Ok(())
}
