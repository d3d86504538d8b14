//! Collections and indexes, read and recreated exactly.
//!
//! The driver's typed `CollectionSpecification` and `IndexModel` drop every field they do not know. Here definitions stay
//! the raw documents that `listCollections` and `listIndexes` sent, and `create` and `createIndexes` are built from them
//! with no more changes than the server insists on. Those are listed at [`CollectionEntry::create`] and
//! [`CollectionEntry::create_indexes`].
//!
//! Reading needs the privileges of the built-in role `read` on the databases, and `listDatabases` (role `backup` or
//! `clusterMonitor`) to see all of them; recreating needs `readWrite` and `dbAdmin`, or the role `restore`.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use mongodb::{
    ClientSession,
    bson::{RawArrayBuf, RawBsonRef, RawDocument, RawDocumentBuf, doc, rawdoc},
    options::SelectionCriteria,
};

use super::raw;
use crate::{
    connect::Deployment,
    error::{Error, ErrorKind, Result},
    namespace::{Namespace, NamespaceSelection},
};

/// What kind of thing a namespace is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum CollectionKind {
    /// An ordinary, capped or clustered collection.
    Collection,
    /// A time-series collection: its documents lie, in buckets, in `system.buckets.<name>`.
    TimeSeries,
    /// A view: a definition without documents.
    View,
}

impl CollectionKind {
    /// The namespace that holds the documents of one of this kind and name; `None` for a view.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for a name that is too long for a time-series collection.
    pub fn data_namespace(self, name: &Namespace) -> Result<Option<Namespace>> {
        Ok(match self {
            Self::Collection => Some(name.clone()),
            Self::TimeSeries => Some(name.sibling(format!("{BUCKETS}{}", name.collection()))?),
            Self::View => None,
        })
    }
}

impl fmt::Display for CollectionKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Collection => "collection",
            Self::TimeSeries => "time-series collection",
            Self::View => "view",
        })
    }
}

/// One namespace as the server describes it.
#[derive(Clone, Debug, PartialEq)]
pub struct CollectionEntry {
    namespace: Namespace,
    kind: CollectionKind,
    info: RawDocumentBuf,
    indexes: Vec<RawDocumentBuf>,
    /// Of the buckets of a time-series collection, whose own listing does not tell it.
    buckets_uuid: Option<[u8; 16]>,
}

/// Something that a catalog does not hold, and why.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct LeftOut {
    /// A namespace, or a database as `name.*`.
    pub namespace: String,
    /// Why it was left out.
    pub reason: String,
}

impl LeftOut {
    /// Something left out.
    pub fn new(namespace: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { namespace: namespace.into(), reason: reason.into() }
    }
}

/// The chosen namespaces of a deployment, sorted by name.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Catalog {
    /// The namespaces.
    pub entries: Vec<CollectionEntry>,
    /// What the selection would have taken but no copy should contain.
    pub left_out: Vec<LeftOut>,
}

impl Catalog {
    /// Reads the definitions of every selected namespace.
    ///
    /// Not read: the databases `local` and `config`, the system collections of `admin` (users, roles, keys),
    /// `system.profile` and the server's temporary collections; they are named in [`left_out`](Self::left_out) if the
    /// selection covers them. The read is not atomic: compare two readings to see whether anything changed.
    ///
    /// # Errors
    /// Those of the server: [`ErrorKind::Unauthorized`] when a database may not be listed, [`ErrorKind::Unavailable`].
    ///
    /// # Cancel safety
    /// Dropping the future leaves nothing behind.
    pub async fn read(deployment: &Deployment, selection: &NamespaceSelection, from: Option<&SelectionCriteria>) -> Result<Self> {
        let mut catalog = Self::default();
        let admin = deployment.database("admin");
        let mut command = doc! { "listDatabases": 1, "nameOnly": true };
        if selection.is_open() {
            // Otherwise the server silently lists only what this user may see, and "everything" would not be everything.
            command.insert("authorizedDatabases", false);
        }
        let mut databases = admin.run_command(command);
        if let Some(criteria) = from {
            databases = databases.selection_criteria(criteria.clone());
        }
        let reply = databases.await?;
        let names: BTreeSet<String> = reply
            .get_array("databases")
            .map_err(|error| Error::corrupt("listDatabases did not answer with a list").with_source(error))?
            .iter()
            .filter_map(|database| Some(database.as_document()?.get_str("name").ok()?.to_owned()))
            .collect();
        for name in names {
            catalog.read_database(deployment, &name, selection, from).await?;
        }
        catalog.entries.sort_by(|a, b| a.namespace.cmp(&b.namespace));
        catalog.left_out.sort();
        Ok(catalog)
    }

    /// Reads the definitions of the collections that hold users and roles, and adds those that the selection covers; if there are any, also
    /// `admin.system.version`, which tells their form.
    ///
    /// They are of use only to whoever merges them as the server demands it, and are not part of [`read`](Self::read) for that reason.
    /// Where the privilege is missing (role `backup`, or `userAdminAnyDatabase`) they stay in [`left_out`](Self::left_out).
    ///
    /// # Errors
    /// Those of the server, but for [`ErrorKind::Unauthorized`].
    ///
    /// # Cancel safety
    /// Dropping the future leaves nothing behind.
    pub async fn read_users_and_roles(&mut self, deployment: &Deployment, selection: &NamespaceSelection) -> Result<()> {
        let admin = deployment.database("admin");
        let names = RawArrayBuf::from_iter(USERS_AND_ROLES);
        let mut listed =
            raw::list(&admin, rawdoc! { "listCollections": 1, "filter": { "name": { "$in": names } } }, None).await?;
        // The version comes last: whether it is wanted depends on the others.
        listed.sort_by_key(|info| info.get_str("name").is_ok_and(|name| name == "system.version"));
        let mut found_any = false;
        for info in listed {
            let name = info.get_str("name").map_err(|error| Error::corrupt("listCollections sent no name").with_source(error))?;
            let namespace = Namespace::new("admin", name)?;
            if !selection.selects(&namespace) || namespace.collection() == "system.version" && !found_any {
                continue;
            }
            // Listing is allowed to many who may not read.
            match admin.collection::<RawDocumentBuf>(namespace.collection()).find_one(doc! {}).await.map_err(Error::from) {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::Unauthorized => continue,
                Err(error) => return Err(error),
            }
            let mut entry =
                CollectionEntry { namespace, kind: CollectionKind::Collection, info, indexes: Vec::new(), buckets_uuid: None };
            entry.read_indexes(&admin, None).await?;
            found_any = true;
            self.left_out.retain(|left_out| left_out.namespace != entry.namespace.to_string());
            self.entries.push(entry);
        }
        self.entries.sort_by(|a, b| a.namespace.cmp(&b.namespace));
        Ok(())
    }

    /// The entry of a namespace.
    pub fn get(&self, namespace: &Namespace) -> Option<&CollectionEntry> {
        let position = self.entries.binary_search_by(|entry| entry.namespace.cmp(namespace)).ok()?;
        self.entries.get(position)
    }

    async fn read_database(
        &mut self,
        deployment: &Deployment,
        name: &str,
        selection: &NamespaceSelection,
        from: Option<&SelectionCriteria>,
    ) -> Result<()> {
        if name == "local" || name == "config" {
            let whole = format!("{name}.*");
            if selection.include.is_empty() || selection.include.iter().any(|pattern| pattern.to_string().starts_with(name)) {
                self.left_out.push(LeftOut::new(whole, "belongs to the server itself"));
            }
            return Ok(());
        }
        let database = deployment.database(name);
        let infos = raw::list(&database, rawdoc! { "listCollections": 1 }, from).await?;
        let uuid_of = |name: &str| {
            infos.iter().find(|info| info.get_str("name").is_ok_and(|other| other == name)).and_then(|info| uuid_in(info))
        };
        let time_series: BTreeMap<String, Option<[u8; 16]>> = infos
            .iter()
            .filter(|info| info.get_str("type").is_ok_and(|kind| kind == "timeseries"))
            .filter_map(|info| info.get_str("name").ok())
            .map(|name| (name.to_owned(), uuid_of(&format!("{BUCKETS}{name}"))))
            .collect();
        let mut chosen = Vec::new();
        for info in infos {
            let collection =
                info.get_str("name").map_err(|error| Error::corrupt("listCollections sent no name").with_source(error))?;
            let namespace = Namespace::new(name, collection)?;
            // The buckets of a time-series collection are its documents, not a namespace of their own.
            if collection.strip_prefix(BUCKETS).is_some_and(|owner| time_series.contains_key(owner))
                || collection == "system.views"
            {
                continue;
            }
            if !selection.selects(&namespace) {
                continue;
            }
            if let Some(reason) = unfit(&namespace) {
                self.left_out.push(LeftOut::new(namespace.to_string(), reason));
                continue;
            }
            let kind = match info.get_str("type") {
                Ok("view") => CollectionKind::View,
                Ok("timeseries") => CollectionKind::TimeSeries,
                // Servers before 3.4 sent no type.
                Ok("collection") | Err(_) => CollectionKind::Collection,
                Ok(other) => {
                    return Err(Error::new(ErrorKind::Unsupported, "the server has a kind of collection that is not known here")
                        .with_context("namespace", &namespace)
                        .with_context("type", other));
                }
            };
            let buckets_uuid = time_series.get(collection).copied().flatten();
            chosen.push(CollectionEntry { namespace, kind, info, indexes: Vec::new(), buckets_uuid });
        }
        let entries: Vec<CollectionEntry> = stream::iter(chosen)
            .map(|mut entry| {
                let database = database.clone();
                async move {
                    entry.read_indexes(&database, from).await?;
                    Ok::<_, Error>(entry)
                }
            })
            .buffered(LISTINGS_AT_ONCE)
            .try_collect()
            .await?;
        self.entries.extend(entries);
        Ok(())
    }
}

/// The collections of `admin` that hold users and roles, and the version of their form.
pub const USERS_AND_ROLES: [&str; 3] = ["system.users", "system.roles", "system.version"];

/// The UUIDs of a database's collections by their names, those of buckets and system collections included.
///
/// # Errors
/// Those of the server. A database that does not exist has no collections.
///
/// # Cancel safety
/// Dropping the future leaves nothing behind.
pub async fn collection_uuids(
    deployment: &Deployment,
    database: &str,
    from: Option<&SelectionCriteria>,
) -> Result<BTreeMap<String, [u8; 16]>> {
    let command = rawdoc! { "listCollections": 1, "filter": { "type": { "$ne": "view" } } };
    let infos = raw::list(&deployment.database(database), command, from).await?;
    Ok(infos.iter().filter_map(|info| Some((info.get_str("name").ok()?.to_owned(), uuid_in(info)?))).collect())
}

fn uuid_in(info: &RawDocument) -> Option<[u8; 16]> {
    info.get_document("info").ok()?.get_binary("uuid").ok()?.bytes.try_into().ok()
}

fn unfit(namespace: &Namespace) -> Option<&'static str> {
    let collection = namespace.collection();
    if namespace.database() == "admin" && collection.starts_with("system.") {
        return Some("users, roles and keys are not part of a data copy");
    }
    if namespace.database() == "admin" && collection.starts_with("mongo_backup.") {
        return Some("kept by restores for themselves");
    }
    if collection == "system.profile" {
        return Some("the profiler's own collection");
    }
    if collection.starts_with("tmp.agg_out.")
        || collection.starts_with("system.resharding.")
        || collection.starts_with("system.drop.")
    {
        return Some("a temporary collection of the server");
    }
    if collection.starts_with(BUCKETS) {
        return Some("buckets without their time-series collection");
    }
    None
}

impl CollectionEntry {
    /// An entry from what an earlier reading stored.
    ///
    /// # Errors
    /// [`ErrorKind::CorruptData`] when `info` is no `listCollections` document.
    pub fn from_parts(
        namespace: Namespace,
        kind: CollectionKind,
        info: RawDocumentBuf,
        indexes: Vec<RawDocumentBuf>,
    ) -> Result<Self> {
        info.get_document("options").map_err(|error| Error::corrupt("a collection has no options").with_source(error))?;
        Ok(Self { namespace, kind, info, indexes, buckets_uuid: None })
    }

    /// The same with the UUID of its buckets, as an earlier reading stored it.
    #[must_use]
    pub fn with_buckets_uuid(mut self, uuid: Option<[u8; 16]>) -> Self {
        self.buckets_uuid = uuid;
        self
    }

    /// Its name.
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// Its kind.
    pub fn kind(&self) -> CollectionKind {
        self.kind
    }

    /// The document of `listCollections`, as sent.
    pub fn info(&self) -> &RawDocument {
        &self.info
    }

    /// The documents of `listIndexes`, as sent; none for a view.
    pub fn indexes(&self) -> &[RawDocumentBuf] {
        &self.indexes
    }

    /// The `options` of `listCollections`.
    pub fn options(&self) -> &RawDocument {
        self.info.get_document("options").unwrap_or_else(|_| empty())
    }

    /// The UUID that the server gave the collection, or of a time-series collection its buckets: it survives a rename and changes with a drop.
    pub fn uuid(&self) -> Option<[u8; 16]> {
        uuid_in(&self.info).or(self.buckets_uuid)
    }

    /// The namespace that holds the documents; `None` for a view.
    pub fn data_namespace(&self) -> Option<Namespace> {
        // The server has it, so its name is not too long.
        self.kind.data_namespace(&self.namespace).ok().flatten()
    }

    /// Whether the collection is capped: insertion order is part of its content.
    pub fn is_capped(&self) -> bool {
        matches!(self.options().get("capped"), Ok(Some(RawBsonRef::Boolean(true))))
    }

    /// Whether documents are stored in `_id` order, without an `_id` index.
    pub fn is_clustered(&self) -> bool {
        self.kind == CollectionKind::TimeSeries || matches!(self.options().get("clusteredIndex"), Ok(Some(_)))
    }

    /// Whether two readings describe the same collection with the same definition.
    pub fn is_same_as(&self, other: &Self) -> bool {
        self == other
    }

    async fn read_indexes(&mut self, database: &mongodb::Database, from: Option<&SelectionCriteria>) -> Result<()> {
        if self.kind == CollectionKind::View {
            return Ok(());
        }
        match raw::list(database, rawdoc! { "listIndexes": self.namespace.collection() }, from).await {
            Ok(indexes) => self.indexes = indexes,
            // NamespaceNotFound: dropped since it was listed; the second reading of the catalog will show it.
            Err(error) if error.server_code() == Some(26) => {}
            Err(error) => return Err(error.with_context("namespace", &self.namespace)),
        }
        Ok(())
    }

    /// The `create` command that makes this collection as `target`.
    ///
    /// `options` go in as they came, in their order. Left out, because `create` refuses them: `autoIndexId` and
    /// `recordIdsReplicated`. Added: `idIndex`, the definition of the `_id` index with its version and collation (a
    /// clustered collection has none). A view's `viewOn` is replaced if `view_on` says so.
    ///
    /// # Errors
    /// [`ErrorKind::CorruptData`] for options that are no valid BSON.
    pub fn create_command(&self, target: &Namespace, view_on: Option<&str>) -> Result<RawDocumentBuf> {
        let mut command = rawdoc! { "create": target.collection() };
        for option in self.options() {
            let (name, value) = option?;
            match (name.as_str(), view_on) {
                ("autoIndexId" | "recordIdsReplicated", _) => {}
                ("viewOn", Some(view_on)) => command.append(name, view_on),
                _ => command.append(name, value),
            }
        }
        if self.kind == CollectionKind::Collection
            && !self.is_clustered()
            && let Some(index) = self.indexes.iter().find(|index| is_id_index(index))
        {
            // `ns` was part of index definitions before 4.4.
            command.append(bson::cstr!("idIndex"), raw::without(index, &["ns"])?);
        }
        Ok(command)
    }

    /// Creates the collection or view as `target`, without its secondary indexes.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] when it exists; the server's own for options that its version does not know.
    ///
    /// # Cancel safety
    /// If the future is dropped the server may or may not have created it.
    pub async fn create(&self, deployment: &Deployment, target: &Namespace, view_on: Option<&str>) -> Result<()> {
        let command = self.create_command(target, view_on)?;
        deployment
            .database(target.database())
            .run_raw_command(command)
            .await
            .map_err(|error| Error::from(error).with_context("creating", target))?;
        Ok(())
    }

    /// The same within the transaction of a session (servers from 4.4 on), with its secondary indexes, for the collection is empty. Not for views and
    /// time-series collections.
    ///
    /// # Errors
    /// As [`create`](Self::create).
    ///
    /// # Cancel safety
    /// If the future is dropped, abort the transaction.
    pub async fn create_in(&self, session: &mut ClientSession, deployment: &Deployment, target: &Namespace) -> Result<()> {
        let failed = |error: mongodb::error::Error| Error::from(error).with_context("creating", target);
        let database = deployment.database(target.database());
        database.run_raw_command(self.create_command(target, None)?).session(&mut *session).await.map_err(failed)?;
        let definitions = self.secondary_indexes()?;
        if !definitions.is_empty() {
            let command = rawdoc! { "createIndexes": target.collection(), "indexes": RawArrayBuf::from_iter(definitions) };
            database.run_raw_command(command).session(session).await.map_err(failed)?;
        }
        Ok(())
    }

    /// The definitions that `createIndexes` needs: every index but the `_id` index and the one that clusters.
    ///
    /// Kept as they came, versions and unknown options included, but for two things: `ns` is left out (older servers sent it,
    /// newer ones refuse it), and an index without a collation in a collection that has one gets
    /// `{locale: "simple"}`, because `createIndexes` would otherwise give it the collection's.
    ///
    /// # Errors
    /// [`ErrorKind::CorruptData`] for a definition that is no valid BSON.
    pub fn secondary_indexes(&self) -> Result<Vec<RawDocumentBuf>> {
        let collated = matches!(self.options().get_document("collation"), Ok(collation) if !collation.get_str("locale").is_ok_and(|locale| locale == "simple"));
        let mut definitions = Vec::new();
        for index in &self.indexes {
            if is_id_index(index) || matches!(index.get("clustered"), Ok(Some(RawBsonRef::Boolean(true)))) {
                continue;
            }
            let mut definition = raw::without(index, &["ns"])?;
            if collated && definition.get("collation")?.is_none() && !is_text(index) {
                definition.append(bson::cstr!("collation"), rawdoc! { "locale": "simple" });
            }
            definitions.push(definition);
        }
        Ok(definitions)
    }

    /// Builds the given index definitions on `target` in one `createIndexes`.
    ///
    /// Building one index at a time scans the collection once for each: give all of them at once, and single ones only
    /// to find out which one the server refuses.
    ///
    /// # Errors
    /// The server's own: [`ErrorKind::Rejected`] when a unique index meets duplicates, [`ErrorKind::Conflict`] when an index of
    /// that name exists with other options.
    ///
    /// # Cancel safety
    /// If the future is dropped the build goes on in the server.
    pub async fn create_indexes(deployment: &Deployment, target: &Namespace, definitions: &[RawDocumentBuf]) -> Result<()> {
        if definitions.is_empty() {
            return Ok(());
        }
        let mut indexes = RawArrayBuf::new();
        for definition in definitions {
            indexes.push(definition.clone());
        }
        deployment
            .database(target.database())
            .run_raw_command(rawdoc! { "createIndexes": target.collection(), "indexes": indexes })
            .await
            .map_err(|error| Error::from(error).with_context("indexes of", target))?;
        Ok(())
    }

    /// The collection's size as its statistics tell it: documents, and bytes of BSON; zeros for a view.
    ///
    /// # Errors
    /// The server's own.
    pub async fn estimate(&self, deployment: &Deployment) -> Result<(u64, u64)> {
        let Some(namespace) = self.data_namespace() else { return Ok((0, 0)) };
        let stats = deployment.database(namespace.database()).run_command(doc! { "collStats": namespace.collection() }).await?;
        let number = |key: &str| crate::connect::integer(&stats, key).and_then(|number| u64::try_from(number).ok()).unwrap_or(0);
        Ok((number("count"), number("size")))
    }
}

/// The `_id` index is `{_id: 1}` with any number that means 1; `{_id: "hashed"}` and `{_id: -1}` are indexes like others.
fn is_id_index(index: &RawDocument) -> bool {
    let Ok(key) = index.get_document("key") else { return false };
    let mut fields = key.iter();
    let one = match fields.next() {
        Some(Ok((name, value))) if name.as_str() == "_id" => match value {
            RawBsonRef::Int32(number) => number == 1,
            RawBsonRef::Int64(number) => number == 1,
            RawBsonRef::Double(number) => (number - 1.0).abs() < f64::EPSILON,
            _ => false,
        },
        _ => false,
    };
    one && fields.next().is_none() && index.get_str("name").is_ok_and(|name| name == "_id_")
}

/// A text index takes no collation but the simple one, and never inherits one.
fn is_text(index: &RawDocument) -> bool {
    index.get("textIndexVersion").is_ok_and(|version| version.is_some())
}

fn empty() -> &'static RawDocument {
    static EMPTY: [u8; 5] = [5, 0, 0, 0, 0];
    // Five constant bytes that are the empty document.
    RawDocument::from_bytes(&EMPTY).unwrap_or_else(|_| unreachable!("the empty document is valid BSON"))
}

const BUCKETS: &str = "system.buckets.";
const LISTINGS_AT_ONCE: usize = 8;

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(options: RawDocumentBuf, indexes: Vec<RawDocumentBuf>) -> CollectionEntry {
        let info = rawdoc! { "name": "c", "type": "collection", "options": options };
        CollectionEntry::from_parts("db.c".parse().unwrap(), CollectionKind::Collection, info, indexes).unwrap()
    }

    fn id_index() -> RawDocumentBuf {
        rawdoc! { "v": 2, "key": { "_id": 1 }, "name": "_id_", "ns": "db.c" }
    }

    #[test]
    fn create_keeps_options_in_order_and_gives_the_id_index() {
        let entry = entry(rawdoc! { "size": 4096, "autoIndexId": true, "capped": true, "unheardOf": 1 }, vec![id_index()]);
        let command = entry.create_command(&"x.y".parse().unwrap(), None).unwrap();
        let expected = rawdoc! { "create": "y", "size": 4096, "capped": true, "unheardOf": 1,
        "idIndex": { "v": 2, "key": { "_id": 1 }, "name": "_id_" } };
        assert_eq!(command, expected);
        assert!(entry.is_capped() && !entry.is_clustered());
    }

    #[test]
    fn only_the_true_id_index_is_left_to_create() {
        let hashed = rawdoc! { "v": 2, "key": { "_id": "hashed" }, "name": "_id_hashed" };
        let descending = rawdoc! { "v": 2, "key": { "_id": -1 }, "name": "_id_-1" };
        let clustered = rawdoc! { "v": 2, "key": { "_id": 1 }, "name": "k", "unique": true, "clustered": true };
        let entry = entry(rawdoc! {}, vec![id_index(), hashed.clone(), descending.clone(), clustered]);
        assert_eq!(entry.secondary_indexes().unwrap(), vec![hashed, descending]);
    }

    #[test]
    fn an_uncollated_index_stays_uncollated_in_a_collated_collection() {
        let plain = rawdoc! { "v": 2, "key": { "a": 1 }, "name": "a_1" };
        let collated = rawdoc! { "v": 2, "key": { "b": 1 }, "name": "b_1", "collation": { "locale": "de" } };
        let entry = entry(rawdoc! { "collation": { "locale": "fr" } }, vec![plain, collated.clone()]);
        let definitions = entry.secondary_indexes().unwrap();
        assert_eq!(definitions[0], rawdoc! { "v": 2, "key": { "a": 1 }, "name": "a_1", "collation": { "locale": "simple" } });
        assert_eq!(definitions[1], collated);
    }
}
