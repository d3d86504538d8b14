//! Replication modes as named write concerns.

use std::{fmt, num::NonZeroU32, str::FromStr, time::Duration};

use mongodb::{
    Collection, Database,
    options::{Acknowledgment, CollectionOptions, DatabaseOptions, WriteConcern},
};

use crate::error::{Error, Result};

/// How many members must have a write before it is acknowledged.
///
/// MongoDB always replicates asynchronously; what differs is how long a writer waits. The three names are those that
/// other databases use:
///
/// | mode | write concern | waits for |
/// |---|---|---|
/// | [`Asynchronous`](Self::Asynchronous) | `{w: 1}` | the primary's memory |
/// | [`SemiSynchronous`](Self::SemiSynchronous) | `{w: "majority", j: true}` | the journals of a majority of the voting members |
/// | [`Synchronous`](Self::Synchronous) | `{w: n, j: true}`, n being all data-bearing members | the journals of all |
///
/// # What each can lose of what was acknowledged
///
/// | event | asynchronous | semi-synchronous | synchronous |
/// |---|---|---|---|
/// | the primary's process is killed and restarts | up to 100 ms of writes, until the next journal flush | nothing | nothing |
/// | the primary's machine loses power and restarts | up to 100 ms of writes | nothing | nothing |
/// | failover to another member | what had not been replicated: it is rolled back, and written to files on the old primary | nothing | nothing |
/// | a network partition with the primary in the minority | everything that the minority's primary acknowledges until it notices (10 s by default) | nothing: the minority acknowledges nothing | nothing: it acknowledges nothing |
/// | the primary's disk is lost for good | what had not been replicated | nothing | nothing |
/// | the disks of a minority are lost for good, the primary's among them | what only they had | nothing | nothing |
/// | the disks of a majority are lost for good | all but what has reached the rest | what only they had | nothing |
///
/// "Nothing" supposes that `writeConcernMajorityJournalDefault` is on, which it is by default, that all members use a
/// storage engine that journals, and that the configuration of the set is never forced.
///
/// # What each costs
///
/// | | asynchronous | semi-synchronous | synchronous |
/// |---|---|---|---|
/// | time of a write | one round trip | the median member's replication and journal | the slowest member's |
/// | one member of three is down | writes go on | writes go on | **no write is acknowledged** until the time limit |
/// | a majority is down | there is no primary | there is no primary | there is no primary |
///
/// A delayed member makes synchronous writes wait for its delay: count only the others. Arbiters hold nothing and
/// acknowledge nothing: with one arbiter in a set of three, a single data-bearing member that fails stops
/// semi-synchronous writes too.
///
/// # A time limit that passes is not a failure of the write
///
/// The write stays on the primary and goes on replicating. What is known is only that it had not reached where it should
/// in time: the driver's error is classified as [`ErrorKind::Timeout`](crate::ErrorKind::Timeout). Without a limit
/// ([`Duration::ZERO`]) a write waits until the members are back.
///
/// Reads are another matter: a read may see a write that is not safe yet, and that a failover undoes. Read with
/// [`ReadConcern::majority`](mongodb::options::ReadConcern::majority) to see only what stays.
///
/// # Examples
/// ```no_run
/// # async fn example(client: mongo_core::mongodb::Client) -> mongo_core::Result<()> {
/// use std::num::NonZeroU32;
///
/// use mongo_core::ReplicationMode;
/// use mongo_core::bson::{Document, doc};
///
/// let members = NonZeroU32::MIN.saturating_add(2);
/// let bank = client.database_with_options("bank", ReplicationMode::SemiSynchronous.database_options(members));
/// let transfers = bank.collection::<Document>("transfers");
/// transfers.insert_one(doc! { "cents": 1_00 }).await?; // on a majority's disks
///
/// let clicks = ReplicationMode::Asynchronous.on_collection(&bank.collection::<Document>("clicks"), members);
/// clicks.insert_one(doc! { "x": 3 }).await?; // fast, and nobody will miss it
/// # Ok(()) }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "kebab-case"))]
#[non_exhaustive]
pub enum ReplicationMode {
    /// Acknowledged by the primary alone.
    Asynchronous,
    /// Acknowledged by a majority, on disk.
    SemiSynchronous,
    /// Acknowledged by every data-bearing member, on disk.
    Synchronous,
}

impl ReplicationMode {
    /// How long a write waits for other members unless said otherwise.
    pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10);

    /// The write concern, with [`DEFAULT_TIMEOUT`](Self::DEFAULT_TIMEOUT).
    ///
    /// `members` is the number of data-bearing members, as
    /// [`ReplicaSetConfig::data_bearing_members`](crate::replica_set::ReplicaSetConfig::data_bearing_members) counts them,
    /// less those that are delayed. Only [`Synchronous`](Self::Synchronous) uses it; servers refuse to wait for more
    /// members than there are.
    ///
    /// ```
    /// use std::num::NonZeroU32;
    /// use mongo_core::ReplicationMode;
    /// use mongo_core::mongodb::options::Acknowledgment;
    ///
    /// let three = NonZeroU32::MIN.saturating_add(2);
    /// assert_eq!(ReplicationMode::SemiSynchronous.write_concern(three).w, Some(Acknowledgment::Majority));
    /// assert_eq!(ReplicationMode::Synchronous.write_concern(three).w, Some(Acknowledgment::Nodes(3)));
    /// ```
    pub fn write_concern(self, members: NonZeroU32) -> WriteConcern {
        self.write_concern_within(members, Self::DEFAULT_TIMEOUT)
    }

    /// The write concern, with a time limit of the caller's; [`Duration::ZERO`] is none.
    pub fn write_concern_within(self, members: NonZeroU32, timeout: Duration) -> WriteConcern {
        let mut concern = WriteConcern::from(match self {
            Self::Asynchronous => Acknowledgment::Nodes(1),
            Self::SemiSynchronous => Acknowledgment::Majority,
            Self::Synchronous => Acknowledgment::Nodes(members.get()),
        });
        if self != Self::Asynchronous {
            concern.journal = Some(true);
            concern.w_timeout = Some(timeout).filter(|timeout| !timeout.is_zero());
        }
        concern
    }

    /// Options for [`Client::database_with_options`](mongodb::Client::database_with_options): all collections of that
    /// handle write in this mode.
    pub fn database_options(self, members: NonZeroU32) -> DatabaseOptions {
        DatabaseOptions::builder().write_concern(self.write_concern(members)).build()
    }

    /// Options for [`Database::collection_with_options`](mongodb::Database::collection_with_options).
    pub fn collection_options(self, members: NonZeroU32) -> CollectionOptions {
        CollectionOptions::builder().write_concern(self.write_concern(members)).build()
    }

    /// The same database, through a handle that writes in this mode and reads as the given one does.
    pub fn on_database(self, database: &Database, members: NonZeroU32) -> Database {
        let mut options = self.database_options(members);
        options.read_concern = database.read_concern().cloned();
        options.selection_criteria = database.selection_criteria().cloned();
        database.client().database_with_options(database.name(), options)
    }

    /// The same collection, through a handle that writes in this mode and reads as the given one does.
    pub fn on_collection<T: Send + Sync>(self, collection: &Collection<T>, members: NonZeroU32) -> Collection<T> {
        let mut options = self.collection_options(members);
        options.read_concern = collection.read_concern().cloned();
        options.selection_criteria = collection.selection_criteria().cloned();
        let database = collection.client().database(&collection.namespace().db);
        database.collection_with_options(collection.name(), options)
    }

    /// The name, as [`FromStr`] reads it and `Display` writes it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Asynchronous => "asynchronous",
            Self::SemiSynchronous => "semi-synchronous",
            Self::Synchronous => "synchronous",
        }
    }
}

impl fmt::Display for ReplicationMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for ReplicationMode {
    type Err = Error;

    /// Reads `asynchronous`, `semi-synchronous` or `synchronous`, in any case.
    fn from_str(text: &str) -> Result<Self> {
        [Self::Asynchronous, Self::SemiSynchronous, Self::Synchronous]
            .into_iter()
            .find(|mode| mode.as_str().eq_ignore_ascii_case(text))
            .ok_or_else(|| Error::invalid("a replication mode is asynchronous, semi-synchronous or synchronous"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const THREE: NonZeroU32 = NonZeroU32::MIN.saturating_add(2);

    #[test]
    fn each_mode_is_one_write_concern() {
        let concern = ReplicationMode::Asynchronous.write_concern(THREE);
        assert_eq!((concern.w, concern.journal, concern.w_timeout), (Some(Acknowledgment::Nodes(1)), None, None));
        let concern = ReplicationMode::SemiSynchronous.write_concern(THREE);
        let limit = Some(ReplicationMode::DEFAULT_TIMEOUT);
        assert_eq!((concern.w, concern.journal, concern.w_timeout), (Some(Acknowledgment::Majority), Some(true), limit));
        let concern = ReplicationMode::Synchronous.write_concern(THREE);
        assert_eq!((concern.w, concern.journal, concern.w_timeout), (Some(Acknowledgment::Nodes(3)), Some(true), limit));
    }

    #[test]
    fn no_time_limit_is_none_at_all() {
        assert_eq!(ReplicationMode::Synchronous.write_concern_within(THREE, Duration::ZERO).w_timeout, None);
    }

    #[test]
    fn names_are_read_as_they_are_written() {
        for mode in [ReplicationMode::Asynchronous, ReplicationMode::SemiSynchronous, ReplicationMode::Synchronous] {
            assert_eq!(mode.to_string().parse::<ReplicationMode>().unwrap(), mode);
        }
        assert!("sync".parse::<ReplicationMode>().is_err());
    }
}
