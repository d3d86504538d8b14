//! Everyday data access, as extension traits over the driver's own handles.
//!
//! Nothing here hides the driver: a [`Collection`] stays a [`Collection`], and what a method of these traits does not
//! offer, the driver's own methods do. Bring the trait of a handle into scope and its methods appear:
//!
//! | trait | on | what it adds |
//! |---|---|---|
//! | [`CollectionExt`] | `mongodb::Collection<T>` | batched insert, streamed find and aggregate, text and geospatial search, statistics, change watching |
//! | [`DatabaseExt`] | `mongodb::Database` | collection names, statistics, change watching |
//! | [`ClientExt`] | `mongodb::Client` | change watching over the whole deployment |
//! | [`GridFsExt`] | `mongodb::gridfs::GridFsBucket` | files in and out, with metadata |
//!
//! [`run_concurrently`] runs several operations of any kind at once, within a limit.
//!
//! Memory is flat: whatever the size of a collection, an insert holds a few batches and a read one server reply and
//! one chunk.

mod area;
mod concurrent;
mod files;
mod insert;
mod insert_outcome;
mod search;
mod stats;
mod stream;
mod watch;

use std::borrow::Borrow;

use futures_util::stream::{BoxStream, Stream};
use mongodb::{
    Client, Collection, Database,
    bson::{Document, RawDocumentBuf},
    options::{AggregateOptions, FindOptions},
};
use serde::{Serialize, de::DeserializeOwned};

use crate::error::Result;

pub use area::{GeoArea, GeoPoint};
pub use concurrent::{OnFailure, run_concurrently};
pub use files::{GridFsExt, PutSettings, StoredFile};
pub use insert::{BatchInserter, InsertOrder, InsertReport, InsertSettings};
pub use insert_outcome::DocumentFailure;
pub use search::{NearSettings, Nearby, Scored, TextSearchSettings, WithinSettings};
pub use stats::{CollectionStatistics, DatabaseStatistics};
pub use stream::ChunkSettings;
pub use watch::{ChangeWatcher, OnInvalidate, WatchSettings, WatchStart};

/// Everyday operations on a driver's [`Collection`].
///
/// The trait is implemented for every `Collection<T>` and is not meant to be implemented elsewhere. Every method uses
/// the read concern, write concern and read preference of the handle that it is called on.
pub trait CollectionExt<T: Send + Sync>: sealed::Sealed {
    /// Inserts any number of documents, in batches bounded by count and by bytes.
    ///
    /// `documents` is consumed as batches are sent, so an iterator that makes its documents on the fly inserts a
    /// million of them in the memory of a few batches. Owned documents and references are both accepted.
    ///
    /// A document that the server refuses (a unique index, a validator, its size) is not an error of the call: it is
    /// in [`InsertReport::failures`] with its index, and counts in [`InsertReport::failed`]. With
    /// [`InsertOrder::Unordered`] all others are still inserted. With [`InsertOrder::Ordered`], the default as in
    /// MongoDB itself, insertion stops there: everything before that index is inserted and nothing after it.
    ///
    /// The driver retries a batch once after a lost connection, and the server recognises what it has already
    /// applied, so that retry inserts nothing twice (replica sets and sharded clusters only). Privilege: `insert` on
    /// the collection.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for settings out of range or a write concern that this deployment can never satisfy;
    /// [`ErrorKind::Timeout`] when a write concern was not satisfied in time: the documents are on the primary, but
    /// not known to be where they were asked to be; [`ErrorKind::Unavailable`] when the connection was lost. The
    /// error's context says how many documents were `inserted`, how many `failed`, and of how many the
    /// outcome is unknown (`unknown`). To have the failures themselves even then, use
    /// [`batch_inserter`](Self::batch_inserter).
    ///
    /// # Cancel safety
    /// Dropping the future stops insertion; whether the batches on their way were applied is then unknown.
    ///
    /// # Examples
    /// ```no_run
    /// # async fn example(client: mongo_core::mongodb::Client) -> mongo_core::Result<()> {
    /// use mongo_core::bson::{Document, doc};
    /// use mongo_core::data::{CollectionExt, InsertSettings};
    ///
    /// let readings = client.database("plant").collection::<Document>("readings");
    /// let documents = (0..1_000_000).map(|n| doc! { "_id": n, "celsius": 20 + n % 7 });
    /// let report = readings.insert_batched(documents, InsertSettings::unordered()).await?;
    /// for failure in &report.failures {
    ///     eprintln!("document {}: {}", failure.index, failure.message);
    /// }
    /// # Ok(()) }
    /// ```
    ///
    /// [`ErrorKind::InvalidInput`]: crate::ErrorKind::InvalidInput
    /// [`ErrorKind::Timeout`]: crate::ErrorKind::Timeout
    /// [`ErrorKind::Unavailable`]: crate::ErrorKind::Unavailable
    fn insert_batched<I, D>(&self, documents: I, settings: InsertSettings) -> impl Future<Output = Result<InsertReport>> + Send
    where
        I: IntoIterator<Item = D> + Send,
        I::IntoIter: Send,
        D: Borrow<T>,
        T: Serialize;

    /// [`insert_batched`](Self::insert_batched) for a stream: a file being parsed, a message queue, another query.
    ///
    /// # Errors
    /// As [`insert_batched`](Self::insert_batched). An error of the stream itself ends the insert and is returned with
    /// its own kind; documents that were not in a full batch by then are not sent.
    ///
    /// # Cancel safety
    /// As [`insert_batched`](Self::insert_batched).
    ///
    /// # Examples
    /// ```no_run
    /// # async fn example(source: mongo_core::mongodb::Collection<mongo_core::bson::Document>,
    /// #     target: mongo_core::mongodb::Collection<mongo_core::bson::Document>) -> mongo_core::Result<()> {
    /// use futures_util::TryStreamExt;
    /// use mongo_core::Error;
    /// use mongo_core::bson::doc;
    /// use mongo_core::data::{CollectionExt, InsertSettings};
    ///
    /// let documents = source.find(doc! { "active": true }).await?.map_err(Error::from);
    /// let report = target.insert_stream(documents, InsertSettings::default()).await?;
    /// # Ok(()) }
    /// ```
    fn insert_stream<S, D>(&self, documents: S, settings: InsertSettings) -> impl Future<Output = Result<InsertReport>> + Send
    where
        S: Stream<Item = Result<D>> + Send,
        D: Borrow<T>,
        T: Serialize;

    /// An inserter to push documents to one by one: for hosts that want the report while it grows, or cancellation.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](crate::ErrorKind::InvalidInput) for settings out of range.
    ///
    /// # Examples
    /// ```no_run
    /// # async fn example(collection: mongo_core::mongodb::Collection<mongo_core::bson::Document>,
    /// #     shutdown: mongo_core::CancellationToken) -> mongo_core::Result<()> {
    /// use mongo_core::bson::doc;
    /// use mongo_core::data::{CollectionExt, InsertSettings};
    ///
    /// let mut inserter = collection.batch_inserter(InsertSettings::unordered())?.with_cancellation(shutdown);
    /// for n in 0..100_000 {
    ///     if inserter.push(&doc! { "n": n }).await?.is_break() {
    ///         break;
    ///     }
    /// }
    /// let report = inserter.finish().await?;
    /// # Ok(()) }
    /// ```
    fn batch_inserter(&self, settings: InsertSettings) -> Result<BatchInserter<T>>;

    /// Streams the documents that match `filter`, in chunks, with flat memory.
    ///
    /// Nothing is sent before the stream is polled. The first error ends the stream: a cursor that has failed may have
    /// skipped documents, so it is never read on, and is closed on the server. To go on after an error, start a new
    /// find behind the last document that arrived. Privilege: `find` on the collection.
    ///
    /// # Errors
    /// Items are [`ErrorKind::InvalidInput`](crate::ErrorKind::InvalidInput) for settings out of range, a filter that
    /// the server refuses, or a document that does not fit `T`; other kinds as the server and the network fail.
    ///
    /// # Cancel safety
    /// Dropping the stream closes the cursor on the server in the background. A dropped `next()` loses nothing.
    ///
    /// # Examples
    /// ```no_run
    /// # async fn example(orders: mongo_core::mongodb::Collection<mongo_core::bson::Document>) -> mongo_core::Result<()> {
    /// use futures_util::TryStreamExt;
    /// use mongo_core::bson::doc;
    /// use mongo_core::data::{ChunkSettings, CollectionExt};
    ///
    /// let mut chunks = orders.find_chunks(doc! { "paid": true }, ChunkSettings::default());
    /// while let Some(chunk) = chunks.try_next().await? {
    ///     println!("{} orders", chunk.len());
    /// }
    /// # Ok(()) }
    /// ```
    fn find_chunks(&self, filter: Document, settings: ChunkSettings) -> BoxStream<'static, Result<Vec<T>>>
    where
        T: DeserializeOwned + Send + 'static,
    {
        self.find_chunks_with(filter, FindOptions::default(), settings)
    }

    /// [`find_chunks`](Self::find_chunks) with the driver's own options: sort, projection, hint, limit, collation and so on.
    ///
    /// `batch_size` in `options` is replaced by [`ChunkSettings::documents`].
    ///
    /// # Errors
    /// As [`find_chunks`](Self::find_chunks).
    ///
    /// # Cancel safety
    /// As [`find_chunks`](Self::find_chunks).
    ///
    /// # Examples
    /// ```no_run
    /// # async fn example(orders: mongo_core::mongodb::Collection<mongo_core::bson::Document>) -> mongo_core::Result<()> {
    /// use futures_util::TryStreamExt;
    /// use mongo_core::bson::doc;
    /// use mongo_core::data::{ChunkSettings, CollectionExt};
    /// use mongo_core::mongodb::options::FindOptions;
    ///
    /// let newest_first = FindOptions::builder().sort(doc! { "_id": -1 }).limit(5_000).build();
    /// let mut chunks = orders.find_chunks_with(doc! {}, newest_first, ChunkSettings::default().with_documents(500));
    /// while let Some(chunk) = chunks.try_next().await? {
    ///     println!("{} orders", chunk.len());
    /// }
    /// # Ok(()) }
    /// ```
    fn find_chunks_with(
        &self,
        filter: Document,
        options: FindOptions,
        settings: ChunkSettings,
    ) -> BoxStream<'static, Result<Vec<T>>>
    where
        T: DeserializeOwned + Send + 'static;

    /// Streams the results of an aggregation, in chunks, with flat memory on this side.
    ///
    /// Otherwise as [`find_chunks`](Self::find_chunks). Privilege: `find` on every collection that the pipeline reads,
    /// and what `$out` or `$merge` need.
    ///
    /// # Errors
    /// As [`find_chunks`](Self::find_chunks).
    ///
    /// # Cancel safety
    /// As [`find_chunks`](Self::find_chunks).
    ///
    /// # Examples
    /// ```no_run
    /// # async fn example(orders: mongo_core::mongodb::Collection<mongo_core::bson::Document>) -> mongo_core::Result<()> {
    /// use futures_util::TryStreamExt;
    /// use mongo_core::bson::{Document, doc};
    /// use mongo_core::data::{ChunkSettings, CollectionExt};
    ///
    /// let totals = [doc! { "$group": { "_id": "$customer", "total": { "$sum": "$amount" } } }];
    /// let mut chunks = orders.aggregate_chunks::<Document>(totals, ChunkSettings::default());
    /// while let Some(chunk) = chunks.try_next().await? {
    ///     println!("{} customers", chunk.len());
    /// }
    /// # Ok(()) }
    /// ```
    fn aggregate_chunks<U>(
        &self,
        pipeline: impl IntoIterator<Item = Document>,
        settings: ChunkSettings,
    ) -> BoxStream<'static, Result<Vec<U>>>
    where
        U: DeserializeOwned + Send + 'static,
    {
        self.aggregate_chunks_with(pipeline, AggregateOptions::default(), settings)
    }

    /// [`aggregate_chunks`](Self::aggregate_chunks) with the driver's own options.
    ///
    /// Servers before 6.0 refuse a `$sort` or `$group` of more than 100 MB unless `allow_disk_use` is set; some hosted
    /// deployments refuse the option itself, so it is not set unasked. `batch_size` is replaced by
    /// [`ChunkSettings::documents`].
    ///
    /// # Errors
    /// As [`find_chunks`](Self::find_chunks).
    ///
    /// # Cancel safety
    /// As [`find_chunks`](Self::find_chunks).
    ///
    /// # Examples
    /// ```no_run
    /// # async fn example(orders: mongo_core::mongodb::Collection<mongo_core::bson::Document>) -> mongo_core::Result<()> {
    /// use futures_util::TryStreamExt;
    /// use mongo_core::bson::{Document, doc};
    /// use mongo_core::data::{ChunkSettings, CollectionExt};
    /// use mongo_core::mongodb::options::AggregateOptions;
    ///
    /// let options = AggregateOptions::builder().allow_disk_use(true).build();
    /// let sorted = [doc! { "$sort": { "amount": 1 } }];
    /// let mut chunks = orders.aggregate_chunks_with::<Document>(sorted, options, ChunkSettings::default());
    /// while let Some(chunk) = chunks.try_next().await? {
    ///     println!("{} orders", chunk.len());
    /// }
    /// # Ok(()) }
    /// ```
    fn aggregate_chunks_with<U>(
        &self,
        pipeline: impl IntoIterator<Item = Document>,
        options: AggregateOptions,
        settings: ChunkSettings,
    ) -> BoxStream<'static, Result<Vec<U>>>
    where
        U: DeserializeOwned + Send + 'static;

    /// Searches the collection's text index, best match first.
    ///
    /// `query` has the syntax of [`$text`](https://www.mongodb.com/docs/manual/reference/operator/query/text/): words are
    /// alternatives, `"a phrase"` must occur, `-word` must not. Documents of equal score come in `_id` order. The
    /// score is beside the document, not inside it, so no field of the document is hidden. Needs a text index.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`](crate::ErrorKind::NotFound) when the collection has no text index;
    /// [`ErrorKind::InvalidInput`](crate::ErrorKind::InvalidInput) for an empty query, a limit of 0, or a document that
    /// does not fit `T`.
    ///
    /// # Cancel safety
    /// Reads only: dropping the future is safe.
    ///
    /// # Examples
    /// ```no_run
    /// # async fn example(articles: mongo_core::mongodb::Collection<mongo_core::bson::Document>) -> mongo_core::Result<()> {
    /// use mongo_core::data::{CollectionExt, TextSearchSettings};
    ///
    /// for hit in articles.text_search("coffee \"cold brew\"", TextSearchSettings::default().with_limit(10)).await? {
    ///     println!("{:.2} {}", hit.score, hit.document);
    /// }
    /// # Ok(()) }
    /// ```
    fn text_search(&self, query: &str, settings: TextSearchSettings) -> impl Future<Output = Result<Vec<Scored<T>>>> + Send
    where
        T: DeserializeOwned;

    /// Finds the documents nearest to `point`, with their distance in metres, nearest first.
    ///
    /// `field` holds GeoJSON (or legacy coordinate pairs) and needs a `2dsphere` index.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`](crate::ErrorKind::NotFound) when the collection or its index does not exist;
    /// [`ErrorKind::InvalidInput`](crate::ErrorKind::InvalidInput) for distances that are negative or the wrong way
    /// round, a limit of 0, or a document that does not fit `T`.
    ///
    /// # Cancel safety
    /// Reads only: dropping the future is safe.
    ///
    /// # Examples
    /// ```no_run
    /// # async fn example(shops: mongo_core::mongodb::Collection<mongo_core::bson::Document>) -> mongo_core::Result<()> {
    /// use mongo_core::data::{CollectionExt, GeoPoint, NearSettings};
    ///
    /// let here = GeoPoint::new(2.3522, 48.8566)?;
    /// for shop in shops.near("location", here, NearSettings::default().with_max_distance_metres(2_000.0)).await? {
    ///     println!("{:.0} m {}", shop.distance_metres, shop.document);
    /// }
    /// # Ok(()) }
    /// ```
    fn near(&self, field: &str, point: GeoPoint, settings: NearSettings) -> impl Future<Output = Result<Vec<Nearby<T>>>> + Send
    where
        T: DeserializeOwned;

    /// Finds documents whose `field` lies wholly within `area`, in no particular order.
    ///
    /// A `2dsphere` index makes it fast but is not needed. For more than a page of results, hand
    /// [`GeoArea::filter`] to [`find_chunks`](Self::find_chunks).
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](crate::ErrorKind::InvalidInput) for a polygon that crosses itself, a limit of 0, or
    /// a document that does not fit `T`.
    ///
    /// # Cancel safety
    /// Reads only: dropping the future is safe.
    ///
    /// # Examples
    /// ```no_run
    /// # async fn example(shops: mongo_core::mongodb::Collection<mongo_core::bson::Document>) -> mongo_core::Result<()> {
    /// use mongo_core::data::{CollectionExt, GeoArea, GeoPoint, WithinSettings};
    ///
    /// let map = GeoArea::bounding_box(GeoPoint::new(2.2, 48.8)?, GeoPoint::new(2.5, 48.9)?)?;
    /// let shops = shops.within("location", &map, WithinSettings::default()).await?;
    /// # Ok(()) }
    /// ```
    fn within(&self, field: &str, area: &GeoArea, settings: WithinSettings) -> impl Future<Output = Result<Vec<T>>> + Send
    where
        T: DeserializeOwned;

    /// Counts, sizes and indexes of the collection, added up over all shards.
    ///
    /// Privilege: `collStats` on the collection (role `read`).
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`](crate::ErrorKind::NotFound) when the collection does not exist,
    /// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) for a view.
    ///
    /// # Cancel safety
    /// Reads only: dropping the future is safe.
    ///
    /// # Examples
    /// ```no_run
    /// # async fn example(orders: mongo_core::mongodb::Collection<mongo_core::bson::Document>) -> mongo_core::Result<()> {
    /// use mongo_core::data::CollectionExt;
    ///
    /// let statistics = orders.statistics().await?;
    /// println!("{} documents, {} bytes on disk", statistics.documents, statistics.storage_bytes);
    /// # Ok(()) }
    /// ```
    fn statistics(&self) -> impl Future<Output = Result<CollectionStatistics>> + Send;

    /// Watches the changes of the collection, through elections, lost connections and restarts of members.
    ///
    /// The watcher is open when the future resolves: every later change is seen. Needs a replica set or a sharded
    /// cluster. Privileges: `find` and `changeStream` on the collection.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) on a standalone server,
    /// [`ErrorKind::NotFound`](crate::ErrorKind::NotFound) when the history behind a resume token is gone from the oplog.
    ///
    /// # Cancel safety
    /// Dropping the future opens nothing.
    ///
    /// # Examples
    /// ```no_run
    /// # async fn example(orders: mongo_core::mongodb::Collection<mongo_core::bson::Document>,
    /// #     shutdown: mongo_core::CancellationToken) -> mongo_core::Result<()> {
    /// use mongo_core::data::{CollectionExt, WatchSettings};
    ///
    /// let mut changes = orders.watch_changes(WatchSettings::default()).await?.with_cancellation(shutdown);
    /// while let Some(change) = changes.next_change().await? {
    ///     println!("{:?} {:?}", change.operation_type, change.document_key);
    /// }
    /// let resume_here_next_time = changes.resume_token();
    /// # Ok(()) }
    /// ```
    fn watch_changes(&self, settings: WatchSettings) -> impl Future<Output = Result<ChangeWatcher<T>>> + Send
    where
        T: DeserializeOwned + Unpin + 'static;
}

impl<T: Send + Sync> CollectionExt<T> for Collection<T> {
    async fn insert_batched<I, D>(&self, documents: I, settings: InsertSettings) -> Result<InsertReport>
    where
        I: IntoIterator<Item = D> + Send,
        I::IntoIter: Send,
        D: Borrow<T>,
        T: Serialize,
    {
        let encoded = documents.into_iter().map(|document| insert::encode::<T>(document.borrow()));
        insert::insert_all(self.batch_inserter(settings)?, encoded).await
    }

    async fn insert_stream<S, D>(&self, documents: S, settings: InsertSettings) -> Result<InsertReport>
    where
        S: Stream<Item = Result<D>> + Send,
        D: Borrow<T>,
        T: Serialize,
    {
        use futures_util::StreamExt;

        let encoded = documents.map(|document| document.map(|document| insert::encode::<T>(document.borrow())));
        insert::insert_stream(self.batch_inserter(settings)?, encoded).await
    }

    fn batch_inserter(&self, settings: InsertSettings) -> Result<BatchInserter<T>> {
        BatchInserter::new(self.clone_with_type(), settings)
    }

    fn find_chunks_with(
        &self,
        filter: Document,
        options: FindOptions,
        settings: ChunkSettings,
    ) -> BoxStream<'static, Result<Vec<T>>>
    where
        T: DeserializeOwned + Send + 'static,
    {
        stream::find(raw(self), filter, options, settings)
    }

    fn aggregate_chunks_with<U>(
        &self,
        pipeline: impl IntoIterator<Item = Document>,
        options: AggregateOptions,
        settings: ChunkSettings,
    ) -> BoxStream<'static, Result<Vec<U>>>
    where
        U: DeserializeOwned + Send + 'static,
    {
        stream::aggregate(raw(self), pipeline.into_iter().collect(), options, settings)
    }

    async fn text_search(&self, query: &str, settings: TextSearchSettings) -> Result<Vec<Scored<T>>>
    where
        T: DeserializeOwned,
    {
        search::text(&raw(self), query, settings).await
    }

    async fn near(&self, field: &str, point: GeoPoint, settings: NearSettings) -> Result<Vec<Nearby<T>>>
    where
        T: DeserializeOwned,
    {
        search::near(&raw(self), field, point, settings).await
    }

    async fn within(&self, field: &str, area: &GeoArea, settings: WithinSettings) -> Result<Vec<T>>
    where
        T: DeserializeOwned,
    {
        search::within(&raw(self), field, area, settings).await
    }

    async fn statistics(&self) -> Result<CollectionStatistics> {
        stats::collection(&raw(self)).await
    }

    async fn watch_changes(&self, settings: WatchSettings) -> Result<ChangeWatcher<T>>
    where
        T: DeserializeOwned + Unpin + 'static,
    {
        ChangeWatcher::open(watch::of_collection(self.clone()), settings).await
    }
}

/// Everyday operations on a driver's [`Database`].
///
/// The trait is implemented for `Database` and is not meant to be implemented elsewhere.
pub trait DatabaseExt: sealed::Sealed {
    /// The names of the collections, time series and views, sorted, without the server's own (`system.…`).
    ///
    /// Privilege: `listCollections` on the database (role `read`).
    ///
    /// # Errors
    /// [`ErrorKind::Unauthorized`](crate::ErrorKind::Unauthorized) without the privilege. A database that does not
    /// exist has no collections: that is no error.
    ///
    /// # Cancel safety
    /// Reads only: dropping the future is safe.
    ///
    /// # Examples
    /// ```no_run
    /// # async fn example(database: mongo_core::mongodb::Database) -> mongo_core::Result<()> {
    /// use mongo_core::data::DatabaseExt;
    ///
    /// println!("{}", database.collection_names().await?.join(", "));
    /// # Ok(()) }
    /// ```
    fn collection_names(&self) -> impl Future<Output = Result<Vec<String>>> + Send;

    /// Counts and sizes of the database.
    ///
    /// Privilege: `dbStats` on the database (role `read`). A database that does not exist is all zeros.
    ///
    /// # Errors
    /// [`ErrorKind::Unauthorized`](crate::ErrorKind::Unauthorized) without the privilege.
    ///
    /// # Cancel safety
    /// Reads only: dropping the future is safe.
    ///
    /// # Examples
    /// ```no_run
    /// # async fn example(database: mongo_core::mongodb::Database) -> mongo_core::Result<()> {
    /// use mongo_core::data::DatabaseExt;
    ///
    /// println!("{} bytes of indexes", database.statistics().await?.index_bytes);
    /// # Ok(()) }
    /// ```
    fn statistics(&self) -> impl Future<Output = Result<DatabaseStatistics>> + Send;

    /// Watches the changes of every collection of the database; otherwise as [`CollectionExt::watch_changes`].
    ///
    /// # Errors
    /// As [`CollectionExt::watch_changes`].
    ///
    /// # Cancel safety
    /// Dropping the future opens nothing.
    ///
    /// # Examples
    /// ```no_run
    /// # async fn example(database: mongo_core::mongodb::Database) -> mongo_core::Result<()> {
    /// use mongo_core::data::{DatabaseExt, WatchSettings};
    ///
    /// let mut changes = database.watch_changes(WatchSettings::default()).await?;
    /// while let Some(change) = changes.next_change().await? {
    ///     println!("{:?}", change.ns);
    /// }
    /// # Ok(()) }
    /// ```
    fn watch_changes(&self, settings: WatchSettings) -> impl Future<Output = Result<ChangeWatcher<Document>>> + Send;
}

impl DatabaseExt for Database {
    async fn collection_names(&self) -> Result<Vec<String>> {
        let mut names = self.list_collection_names().await?;
        names.retain(|name| !name.starts_with("system."));
        names.sort_unstable();
        Ok(names)
    }

    async fn statistics(&self) -> Result<DatabaseStatistics> {
        stats::database(self).await
    }

    async fn watch_changes(&self, settings: WatchSettings) -> Result<ChangeWatcher<Document>> {
        ChangeWatcher::open(watch::of_database(self.clone()), settings).await
    }
}

/// Everyday operations on a driver's [`Client`].
///
/// The trait is implemented for `Client` and is not meant to be implemented elsewhere.
pub trait ClientExt: sealed::Sealed {
    /// Watches the changes of every database except `admin`, `local` and `config`; otherwise as
    /// [`CollectionExt::watch_changes`].
    ///
    /// Privileges: `find` and `changeStream` on all collections (role `readAnyDatabase`).
    ///
    /// # Errors
    /// As [`CollectionExt::watch_changes`].
    ///
    /// # Cancel safety
    /// Dropping the future opens nothing.
    ///
    /// # Examples
    /// ```no_run
    /// # async fn example(client: mongo_core::mongodb::Client) -> mongo_core::Result<()> {
    /// use mongo_core::data::{ClientExt, WatchSettings};
    ///
    /// let mut changes = client.watch_changes(WatchSettings::default()).await?;
    /// while let Some(change) = changes.next_change().await? {
    ///     println!("{:?}", change.ns);
    /// }
    /// # Ok(()) }
    /// ```
    fn watch_changes(&self, settings: WatchSettings) -> impl Future<Output = Result<ChangeWatcher<Document>>> + Send;
}

impl ClientExt for Client {
    async fn watch_changes(&self, settings: WatchSettings) -> Result<ChangeWatcher<Document>> {
        ChangeWatcher::open(watch::of_client(self.clone()), settings).await
    }
}

/// The same collection, without its type: what is read is decoded later, once its envelope has been taken off.
fn raw<T: Send + Sync>(collection: &Collection<T>) -> Collection<RawDocumentBuf> {
    collection.clone_with_type()
}

mod sealed {
    use mongodb::{Client, Collection, Database, gridfs::GridFsBucket};

    /// Keeps the extension traits to the driver's handles, so that adding a method breaks nobody.
    #[allow(unnameable_types, reason = "that it cannot be named is its purpose")]
    pub trait Sealed {}

    impl<T: Send + Sync> Sealed for Collection<T> {}
    impl Sealed for Database {}
    impl Sealed for Client {}
    impl Sealed for GridFsBucket {}
}
