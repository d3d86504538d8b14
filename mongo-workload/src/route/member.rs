//! What is known of a member of a replica set, by asking it.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use mongo_core::{
    Error, ErrorKind, Result,
    bson::{Bson, DateTime, Document, Timestamp, doc},
    mongodb::{
        Client,
        options::{ReadPreference, SelectionCriteria, ServerAddress},
    },
};
use tokio::{
    task::JoinSet,
    time::{Instant, timeout},
};

/// What a member does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum MemberRole {
    /// It takes writes.
    Primary,
    /// It follows.
    Secondary,
}

/// What a member has said of itself.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct MemberState {
    /// Its address, as the set's configuration has it.
    pub address: String,
    /// What it does.
    pub role: MemberRole,
    /// The last operation that it has applied.
    pub applied: Timestamp,
    /// How far it was behind the primary, or, without one, behind whoever had come furthest. In whole seconds, as the server keeps it.
    pub lag: Duration,
    /// When it was asked.
    pub(crate) seen: Instant,
}

/// A member's answer.
struct Answer {
    address: String,
    role: MemberRole,
    applied: Timestamp,
    written: DateTime,
    /// Those of its set that can be read from, as it knows them.
    set: BTreeSet<String>,
    seen: Instant,
}

/// Asks every member of a set how far it is: those that are known, and those that they tell of. Those that do not answer in time, or neither lead nor follow, are not in the result.
pub(super) async fn ask_all(client: &Client, known: BTreeSet<String>, within: Duration) -> Result<Vec<MemberState>> {
    let mut answers = ask_these(client, known, within).await?;
    if answers.is_empty() {
        let Whereabouts::Set(addresses) = whereabouts(client, within).await? else {
            let message = "reads are routed among the members of a replica set, and this is none: read from it as it is";
            return Err(Error::new(ErrorKind::Unsupported, message));
        };
        answers = ask_these(client, addresses, within).await?;
    }
    Ok(compared(answers))
}

async fn ask_these(client: &Client, addresses: BTreeSet<String>, within: Duration) -> Result<Vec<Answer>> {
    let mut answers: Vec<Answer> = Vec::new();
    let (mut to_ask, mut asked) = (addresses, BTreeSet::new());
    while !to_ask.is_empty() {
        let mut asking = JoinSet::new();
        for address in to_ask {
            asked.insert(address.clone());
            let client = client.clone();
            asking.spawn(async move { ask(&client, address, within).await });
        }
        while let Some(answer) = asking.join_next().await {
            // Whoever does not answer is not read from; the reason is the monitor's business.
            if let Ok(answer) = answer? {
                answers.push(answer);
            }
        }
        to_ask = answers.iter().flat_map(|answer| &answer.set).filter(|address| !asked.contains(*address)).cloned().collect();
    }
    Ok(answers)
}

/// Where the operations of a client are at work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Whereabouts {
    /// On a server by itself.
    Single,
    /// On the members of a set, of which these can be read from.
    Set(BTreeSet<String>),
    /// Behind a router.
    Router,
}

pub(crate) async fn whereabouts(client: &Client, within: Duration) -> Result<Whereabouts> {
    // Whoever is asked first may be the one that hangs.
    let mut attempt = 1;
    let anybody = loop {
        match hello(client, ReadPreference::Nearest { options: None }.into(), within).await {
            Err(error) if attempt < MOST_ASKED && matches!(error.kind(), ErrorKind::Timeout | ErrorKind::Unavailable) => {
                attempt += 1
            }
            result => break result?,
        }
    };
    if anybody.get_str("msg").is_ok_and(|message| message == "isdbgrid") {
        return Ok(Whereabouts::Router);
    }
    if anybody.get_str("setName").is_err() {
        return Ok(Whereabouts::Single);
    }
    Ok(Whereabouts::Set(set_of(&anybody)))
}

/// The members of the set that can be read from.
fn set_of(hello: &Document) -> BTreeSet<String> {
    let lists = ["hosts", "passives"].into_iter().filter_map(|list| hello.get_array(list).ok());
    lists.flatten().filter_map(|address| address.as_str().map(str::to_owned)).collect()
}

async fn ask(client: &Client, address: String, within: Duration) -> Result<Answer> {
    let reply = hello(client, only(&address)?, within).await?;
    read(&reply, address, Instant::now())
}

fn read(reply: &Document, address: String, seen: Instant) -> Result<Answer> {
    let is = |field: &str| reply.get_bool(field).unwrap_or(false);
    let role = match (is("isWritablePrimary"), is("secondary")) {
        (true, _) => MemberRole::Primary,
        (_, true) => MemberRole::Secondary,
        _ => return Err(Error::new(ErrorKind::Unavailable, "a member neither leads nor follows")),
    };
    let wrong = || Error::corrupt("a member does not say how far it is");
    let last_write = reply.get_document("lastWrite").map_err(|_| wrong())?;
    // {ts, t} since protocol version 1, which is all that 4.0 and later have.
    let applied = last_write.get_document("opTime").and_then(|time| time.get_timestamp("ts")).map_err(|_| wrong())?;
    let Some(Bson::DateTime(written)) = last_write.get("lastWriteDate") else { return Err(wrong()) };
    Ok(Answer { address, role, applied, written: *written, set: set_of(reply), seen })
}

fn compared(answers: Vec<Answer>) -> Vec<MemberState> {
    let leads = |answer: &&Answer| answer.role == MemberRole::Primary;
    // Two that say they lead are one that has not heard yet that it does not.
    let newest = answers
        .iter()
        .filter(leads)
        .map(|answer| answer.written)
        .max()
        .or_else(|| answers.iter().map(|answer| answer.written).max());
    let lag = |answer: &Answer| {
        let behind = newest.map_or(0, |newest| newest.timestamp_millis().saturating_sub(answer.written.timestamp_millis()));
        Duration::from_millis(u64::try_from(behind).unwrap_or(0))
    };
    answers
        .into_iter()
        .map(|answer| MemberState {
            lag: lag(&answer),
            address: answer.address,
            role: answer.role,
            applied: answer.applied,
            seen: answer.seen,
        })
        .collect()
}

async fn hello(client: &Client, from: SelectionCriteria, within: Duration) -> Result<Document> {
    let admin = client.database("admin");
    match timeout(within, admin.run_command(doc! { "hello": 1 }).selection_criteria(from)).await {
        Ok(reply) => Ok(reply?),
        Err(_) => Err(Error::new(ErrorKind::Timeout, "a member did not answer in time")),
    }
}

/// Only the member at this address.
///
/// The driver sends `primaryPreferred` along with a predicate, so that a secondary answers.
pub(crate) fn only(address: &str) -> Result<SelectionCriteria> {
    let address = ServerAddress::parse(address)?;
    Ok(SelectionCriteria::Predicate(Arc::new(move |server| *server.address() == address)))
}

const MOST_ASKED: u32 = 5;

#[cfg(test)]
mod tests {
    use super::*;

    fn reply(role: &str, seconds: i64) -> Document {
        let at = Timestamp { time: u32::try_from(seconds).unwrap(), increment: 1 };
        doc! { role: true, "lastWrite": { "opTime": { "ts": at, "t": 1_i64 }, "lastWriteDate": DateTime::from_millis(seconds * 1000) } }
    }

    fn lags(members: &[(&str, i64)]) -> Vec<u64> {
        let answers =
            members.iter().map(|(role, seconds)| read(&reply(role, *seconds), "a:1".to_owned(), Instant::now()).unwrap());
        compared(answers.collect()).iter().map(|member| member.lag.as_secs()).collect()
    }

    #[test]
    fn lag_is_that_behind_the_primary_or_behind_the_furthest() {
        assert_eq!(lags(&[("isWritablePrimary", 100), ("secondary", 97), ("secondary", 100)]), [0, 3, 0]);
        // A secondary that was asked a moment later is not ahead.
        assert_eq!(lags(&[("isWritablePrimary", 100), ("secondary", 101)]), [0, 0]);
        assert_eq!(lags(&[("secondary", 90), ("secondary", 95)]), [5, 0]);
        // One that has not heard of its successor.
        assert_eq!(lags(&[("isWritablePrimary", 80), ("isWritablePrimary", 100)]), [20, 0]);
        assert_eq!(lags(&[]), [0_u64; 0]);
    }

    #[test]
    fn who_neither_leads_nor_follows_or_does_not_say_how_far_it_is_is_no_member_to_read_from() {
        assert!(read(&reply("arbiterOnly", 1), "a:1".to_owned(), Instant::now()).is_err());
        for broken in [doc! { "secondary": true }, doc! { "secondary": true, "lastWrite": { "opTime": 5, "lastWriteDate": 6 } }] {
            assert_eq!(
                read(&broken, "a:1".to_owned(), Instant::now()).err().map(|error| error.kind()),
                Some(ErrorKind::CorruptData)
            );
        }
    }
}
