//! What a server collects of itself every second (its "full-time diagnostic data capture").
//!
//! `getDiagnosticData` hands out what was collected last: the status of the server, of its set, of its oplog, and of its machine, in one answer that costs the server a fraction of what
//! the commands cost of which it is made, as it has been made already. It is up to a second old. Where it is switched off (`diagnosticDataCollectionEnabled`), not allowed, or stuck,
//! the commands are sent.

use std::{sync::Arc, time::Duration};

use mongo_core::{
    bson::{Bson, DateTime, Document, doc},
    mongodb::Client,
};
use tokio::{sync::Mutex, time::Instant};

/// The newest of one member, for all its collectors.
#[derive(Debug, Default)]
pub(crate) struct Diagnostics(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    last: Option<Last>,
    /// When what is there was collected, by the server's clock, and when that was first seen. The server keeps handing out what it collected last also when it no longer collects:
    /// only what has been seen to go on is of now.
    collected: Option<(DateTime, Instant)>,
    has_gone_on: bool,
    /// Until when it is not asked for.
    unavailable: Option<Instant>,
}

#[derive(Debug)]
struct Last {
    data: Arc<Document>,
    asked: Instant,
}

impl Diagnostics {
    /// What was collected last, if there is any and it is of now, and whether the server has just been asked for it. Collectors that ask within half of an interval get the same.
    ///
    /// # Cancel safety
    /// Dropping the future forgets nothing.
    pub(crate) async fn read(&self, client: &Client, interval: Duration, deadline: Duration) -> Option<(Arc<Document>, bool)> {
        let mut state = self.0.lock().await;
        let now = Instant::now();
        if state.unavailable.is_some_and(|until| now < until) {
            return None;
        }
        if let Some(last) = state.last.as_ref().filter(|last| now - last.asked < interval / 2) {
            return state.has_gone_on.then(|| (Arc::clone(&last.data), false));
        }
        let admin = client.database("admin");
        let asked = admin.run_command(doc! { "getDiagnosticData": 1 }).into_future();
        // Half of the time, so that there is some left for the commands.
        let answer = tokio::time::timeout(deadline / 2, asked).await;
        let Some((collected, data)) = answer.ok().and_then(Result::ok).and_then(collected) else {
            *state = State { unavailable: Some(now + PAUSE), ..State::default() };
            return None;
        };
        state.take(collected, now);
        if state.unavailable.is_some_and(|until| now < until) {
            tracing::debug!("a server does not collect its diagnostic data: its status is asked for");
            return None;
        }
        let data = Arc::new(data);
        state.last = Some(Last { data: Arc::clone(&data), asked: now });
        state.has_gone_on.then_some((data, true))
    }
}

impl State {
    fn take(&mut self, collected: DateTime, now: Instant) {
        match self.collected {
            Some((before, seen)) if before == collected => {
                if now - seen > STUCK {
                    *self = Self { collected: self.collected, unavailable: Some(now + PAUSE), ..Self::default() };
                }
            }
            Some(_) => {
                self.has_gone_on = true;
                self.collected = Some((collected, now));
            }
            None => self.collected = Some((collected, now)),
        }
    }
}

/// What an answer holds, and when it was collected.
fn collected(mut answer: Document) -> Option<(DateTime, Document)> {
    let Some(Bson::Document(mut data)) = answer.remove("data") else { return None };
    // From 8.0 on it stands in parts, by what a process is.
    for part in ["common", "shard", "router"] {
        if let Some(Bson::Document(part)) = data.remove(part) {
            data.extend(part);
        }
    }
    let collected = *data.get_document("serverStatus").ok()?.get_datetime("localTime").ok()?;
    Some((collected, data))
}

/// After how long what could not be had is asked for again.
const PAUSE: Duration = Duration::from_secs(10);
/// It is collected every second, but for a moment on a machine that is very busy.
const STUCK: Duration = Duration::from_secs(3);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_go_on_is_never_taken_for_being_of_now() {
        let (mut state, begun) = (State::default(), Instant::now());
        let mut take = |second: u64, collected: i64| {
            let now = begun + Duration::from_secs(second);
            state.take(DateTime::from_millis(collected), now);
            (state.has_gone_on, state.unavailable.is_some_and(|until| now < until))
        };
        assert_eq!(take(0, 5), (false, false), "it may be an hour old");
        assert_eq!(take(1, 6), (true, false));
        assert_eq!(take(4, 6), (true, false));
        assert_eq!(take(5, 6), (false, true), "stuck");
        // After the pause it is still there.
        assert_eq!(take(20, 6), (false, true));
        assert_eq!(take(40, 7), (true, false));
    }

    #[test]
    fn parts_are_put_together_and_what_is_none_is_none() {
        let at = DateTime::from_millis(5);
        let status = || doc! { "serverStatus": { "localTime": at, "pid": 1 } };
        let mut whole = status();
        whole.insert("replSetGetStatus", doc! { "myState": 1 });
        assert_eq!(collected(doc! { "data": whole.clone() }), Some((at, whole)));
        let parts = doc! { "start": at, "common": status(), "shard": { "replSetGetStatus": { "myState": 2 } } };
        let (_, data) = collected(doc! { "data": parts }).unwrap();
        assert_eq!(data.get_document("replSetGetStatus").unwrap(), &doc! { "myState": 2 });
        assert_eq!(collected(doc! { "data": {} }), None);
        assert_eq!(collected(doc! { "ok": 1 }), None);
    }
}
