//! From a snapshot to a point behind it: which slices hold the way there, and what they tell.

mod definitions;
mod history;
mod point;

use mongo_core::{
    CancellationToken, Error, ErrorKind, Result,
    bson::Timestamp,
    transfer::oplog::{Action, Command, Effect, Entry, ReplicaSetId, Transactions},
};

use self::history::is_barrier;
pub(crate) use self::history::{Ended, History, Subject};
pub use self::point::RestorePoint;
use crate::{
    capture::position,
    repository::{
        Repository, SnapshotChoice,
        manifest::SnapshotManifest,
        slice::{EntrySum, Stretch},
    },
};

/// The way from a snapshot to a point behind it.
#[derive(Clone, Debug)]
pub(crate) struct Timeline {
    repository: Repository,
    set: ReplicaSetId,
    slices: Vec<Stretch>,
    /// What takes effect up to here is in the snapshot.
    reflected: Timestamp,
    /// The last position that takes effect.
    limit: Timestamp,
}

/// Takes what a timeline tells, in order.
pub(crate) trait Listener: Send {
    /// Something takes effect.
    fn take(&mut self, at: Timestamp, action: Action<'_>) -> impl Future<Output = Result<()>> + Send;

    /// Everything that takes effect up to a position was told.
    fn reached(&mut self, at: Timestamp) -> impl Future<Output = Result<()>> + Send {
        let _ = at;
        async { Ok(()) }
    }
}

impl Timeline {
    /// Finds the snapshot and the way from it to a point.
    ///
    /// # Errors
    /// `NotFound` when no snapshot, or not the one asked for, can be rolled forward to the point, naming the nearest points that can be reached.
    pub(crate) async fn find(
        repository: &Repository,
        choice: &SnapshotChoice,
        point: RestorePoint,
    ) -> Result<(SnapshotManifest, Option<Self>)> {
        let candidates = match choice {
            SnapshotChoice::Latest => repository.snapshots().await?.snapshots,
            SnapshotChoice::Id(_) => vec![repository.snapshot(choice).await?],
        };
        let stored = repository.all_stretches().await?;
        let mut reachable: Vec<(Timestamp, Timestamp)> = Vec::new();
        for snapshot in candidates.into_iter().rev() {
            let (Some(set), Some(from), Some(consistent)) =
                (snapshot.replica_set, snapshot.resume_point, snapshot.consistent_from())
            else {
                continue;
            };
            let limit = point.limit();
            let stretches = stored.iter().find(|(other, _)| *other == set).map(|(_, stretches)| stretches);
            // To the end: a transaction that was prepared before the point can commit behind it and take effect before.
            let chain = stretches.map(|stretches| stretches.cover(from, None)).unwrap_or_default();
            // One cluster time needs no oplog.
            let is_exact = snapshot.read_until.is_none();
            let reached = |chain: &[Stretch]| {
                let end = chain.last().map_or(from, |stretch| stretch.last);
                if is_exact { end.max(consistent) } else { end }
            };
            let end = reached(&chain);
            if is_exact && point == RestorePoint::Position(consistent) {
                return Ok((snapshot, None));
            }
            if limit >= consistent && end >= consistent && point.is_reached_by(end) {
                let reflected = snapshot.reflected().unwrap_or(from);
                let timeline = Self { repository: repository.clone(), set, slices: chain, reflected, limit };
                return Ok((snapshot, Some(timeline)));
            }
            if end >= consistent {
                reachable.push((consistent, end));
            }
        }
        Err(unreachable(point, &reachable))
    }

    /// The way that makes one state of a snapshot that was read over a while; none if it needs none.
    pub(crate) async fn settling(repository: &Repository, snapshot: &SnapshotManifest) -> Result<Option<Self>> {
        let (Some(set), Some(from), Some(until)) = (snapshot.replica_set, snapshot.resume_point, snapshot.read_until) else {
            return Ok(None);
        };
        let slices = repository.stretches(set).await?.cover(from, None);
        if slices.last().is_none_or(|last| last.last < until) {
            return Ok(None);
        }
        let reflected = snapshot.reflected().unwrap_or(from);
        Ok(Some(Self { repository: repository.clone(), set, slices, reflected, limit: until }))
    }

    /// Tells a listener everything that takes effect behind the snapshot, up to the limit. Gives the position of the last entry that counts.
    ///
    /// # Errors
    /// `CorruptData` when a slice is missing or damaged or does not begin with the entry with which the one before it ends; `Unsupported` naming
    /// what stands in the way and the last point before it; the listener's own.
    pub(crate) async fn tell(&self, listener: &mut impl Listener, cancel: &CancellationToken) -> Result<Timestamp> {
        let mut transactions = Transactions::new(TRANSACTION_MEMORY);
        let reflected = self.reflected;
        let mut last = reflected;
        let mut before: Option<(Stretch, EntrySum)> = None;
        for stretch in &self.slices {
            if cancel.is_cancelled() {
                return Err(Error::cancelled());
            }
            let slice = self.repository.slice(self.set, *stretch).await?;
            if let Some((before, sum)) = before
                && before.last == stretch.first
                && sum != slice.first_sum
            {
                return Err(Error::corrupt("two slices of the oplog do not belong to one history")
                    .with_context("at", position(stretch.first)));
            }
            let told = before.map(|(before, _)| before.last);
            before = Some((*stretch, slice.last_sum));
            for entry in slice.entries() {
                let entry = Entry::parse(entry?).map_err(|error| match error.kind() {
                    ErrorKind::Unsupported => stopped(&error, last),
                    _ => error,
                })?;
                if told.is_some_and(|told| entry.position <= told) {
                    continue;
                }
                let is_past = entry.position > self.limit;
                // A prepared transaction can take effect before the entry that says so.
                if is_past {
                    if !transactions.has_prepared() {
                        return Ok(last);
                    }
                    let ends = |command: &Command<'_>| ["commitTransaction", "abortTransaction"].contains(&command.name);
                    if !matches!(&entry.action, Some(Action::Command(command)) if ends(command)) {
                        continue;
                    }
                }
                let took = self.take(&entry, is_past, reflected, &mut transactions, listener).await;
                if let Err(error) = took {
                    return Err(if is_barrier(&error) { stopped(&error, last) } else { error });
                }
                if !is_past {
                    last = last.max(entry.position);
                }
            }
            let reached = stretch.last.min(self.limit);
            // What is open can take effect at a time that has passed.
            listener.reached(transactions.oldest_open().map_or(reached, |open| open.min(reached))).await?;
        }
        if transactions.has_prepared() {
            return Err(Error::new(
                ErrorKind::NotFound,
                "a transaction was prepared before the point, and what became of it was not captured: capture more, or restore an earlier point",
            ));
        }
        Ok(last)
    }

    async fn take(
        &self,
        entry: &Entry<'_>,
        is_past: bool,
        reflected: Timestamp,
        transactions: &mut Transactions,
        listener: &mut impl Listener,
    ) -> Result<()> {
        let at = entry.position;
        match transactions.take(entry)? {
            Effect::One(operation) if at > reflected && !is_past => listener.take(at, Action::Operation(operation)).await,
            Effect::Command(command) if at > reflected && !is_past => listener.take(at, Action::Command(command)).await,
            Effect::Many(mut group) if group.at > reflected && group.at <= self.limit => {
                let at = group.at;
                if !group.is_whole {
                    return Err(Error::corrupt(
                        "the oplog that was captured begins within a transaction: restore from another snapshot",
                    )
                    .with_context("at", position(at)));
                }
                while let Some(carried) = group.next_carried()? {
                    for action in carried.actions()? {
                        listener.take(at, action).await?;
                    }
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

fn stopped(error: &Error, last: Timestamp) -> Error {
    let which = error.context().map(|(_, value)| value.to_owned()).collect::<Vec<_>>().join(", ");
    let message = error.to_string();
    let what = message.split(" (").next().unwrap_or_default();
    Error::new(
        ErrorKind::Unsupported,
        format!(
            "{what} ({which}): the last point before that is {}; behind it, restore from a snapshot that was made later",
            position(last)
        ),
    )
}

fn unreachable(point: RestorePoint, reachable: &[(Timestamp, Timestamp)]) -> Error {
    let limit = point.limit();
    let earlier = reachable.iter().map(|(_, end)| *end).filter(|end| *end < limit).max();
    let later = reachable.iter().map(|(consistent, _)| *consistent).filter(|consistent| *consistent > limit).min();
    let nearest: Vec<String> = earlier.into_iter().chain(later).map(|at| format!("{} ({})", position(at), second(at))).collect();
    let nearest = match nearest.as_slice() {
        [] => "no snapshot can be rolled forward at all: capture the oplog of a replica set".to_owned(),
        nearest => format!("the nearest that can be reached: {}", nearest.join(" and ")),
    };
    Error::new(ErrorKind::NotFound, format!("{point} cannot be reached with what was captured; {nearest}"))
}

/// A position's second, for a person.
fn second(at: Timestamp) -> String {
    mongo_core::bson::DateTime::from_millis(i64::from(at.time) * 1000).try_to_rfc3339_string().unwrap_or_default()
}

const TRANSACTION_MEMORY: usize = 32 << 20;
