use std::{
    collections::BTreeMap,
    future::pending,
    sync::{
        Mutex,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
};

use mongo_core::{Error, ErrorKind, bson::Timestamp, metrics::MemoryMetrics};
use tokio::time::Instant;

use super::*;

const PRIMARY: MemberRole = MemberRole::Primary;
const SECONDARY: MemberRole = MemberRole::Secondary;

/// Address, role, the second of the last operation, lag in seconds.
type Said = (&'static str, MemberRole, u32, u64);

fn set(settings: RouterSettings, said: &[Said]) -> Members {
    let members = Members::new(settings, &NoMetrics);
    learn(&members, said);
    members
}

fn learn(members: &Members, said: &[Said]) {
    let state = |(address, role, applied, lag): &Said| MemberState {
        address: (*address).to_owned(),
        role: *role,
        applied: at(*applied),
        lag: Duration::from_secs(*lag),
        seen: Instant::now(),
    };
    members.learn(said.iter().map(state).collect()).unwrap();
}

fn at(second: u32) -> Timestamp {
    Timestamp { time: second, increment: 1 }
}

/// Whom a route goes to, by how often in a thousand.
fn chosen(members: &Members, route: &ReadRoute) -> BTreeMap<String, u32> {
    let mut counts = BTreeMap::new();
    for _ in 0..1000 {
        *counts.entry(members.choose(route, &[]).map_or("nobody".to_owned(), |chosen| chosen.target.address)).or_default() += 1;
    }
    counts
}

fn only(members: &Members, route: &ReadRoute) -> String {
    let chosen = chosen(members, route);
    assert_eq!(chosen.len(), 1, "{chosen:?}");
    chosen.into_keys().next().unwrap()
}

const SET: [Said; 3] = [("a:1", PRIMARY, 100, 0), ("b:1", SECONDARY, 99, 1), ("c:1", SECONDARY, 90, 10)];

#[tokio::test(start_paused = true)]
async fn reads_are_shared_by_weight_and_a_weight_of_none_is_none() {
    let settings = RouterSettings::default().with_weight("b:1", 9);
    let counts = chosen(&set(settings.clone(), &SET), &ReadRoute::secondary());
    assert!((850..950).contains(&counts["b:1"]) && counts.len() == 2, "{counts:?}");
    let counts = chosen(&set(settings.with_weight("c:1", 0), &SET), &ReadRoute::chain([Tier::Any]));
    assert!(!counts.contains_key("c:1") && counts.len() == 2, "{counts:?}");
}

#[tokio::test(start_paused = true)]
async fn whoever_lags_or_lacks_what_was_seen_is_passed_over_and_the_primary_never_is() {
    let members = set(RouterSettings::default(), &SET);
    let preferred = ReadRoute::secondary_preferred;
    assert_eq!(only(&members, &preferred().max_lag(Duration::from_secs(5))), "b:1");
    assert_eq!(only(&members, &preferred().max_lag(Duration::ZERO)), "a:1");
    assert_eq!(only(&members, &ReadRoute::primary().max_lag(Duration::ZERO)), "a:1");
    assert_eq!(only(&members, &ReadRoute::secondary().max_lag(Duration::ZERO)), "nobody");
    let mut token = ReadToken::default();
    token.note("shop", at(99)).unwrap();
    assert_eq!(only(&members, &preferred().after(&token, "shop")), "b:1");
    assert_eq!(chosen(&members, &preferred().after(&token, "another")).len(), 2, "what was seen of one says nothing of another");
    token.note("shop", at(101)).unwrap();
    assert_eq!(only(&members, &preferred().after(&token, "shop")), "a:1");
    // It catches up.
    learn(&members, &[("c:1", SECONDARY, 101, 0)]);
    assert_eq!(only(&members, &preferred().after(&token, "shop")), "c:1");
}

#[tokio::test(start_paused = true)]
async fn one_that_has_not_heard_of_its_successor_is_not_trusted_with_what_that_has() {
    let members = set(RouterSettings::default(), &[("a:1", PRIMARY, 100, 20), ("b:1", PRIMARY, 120, 0)]);
    let mut token = ReadToken::default();
    token.note("shop", at(110)).unwrap();
    assert_eq!(only(&members, &ReadRoute::primary().after(&token, "shop")), "b:1");
    assert_eq!(only(&members, &ReadRoute::primary().max_lag(Duration::from_secs(5))), "b:1");
    // One that has come further and does not answer any more is dead, and what it alone had is lost.
    learn(&members, &[("c:1", PRIMARY, 200, 0)]);
    sleep(Duration::from_secs(1)).await;
    learn(&members, &[("a:1", SECONDARY, 120, 0), ("b:1", PRIMARY, 120, 0)]);
    token.note("shop", at(190)).unwrap();
    let counts = chosen(&members, &ReadRoute::primary().after(&token, "shop"));
    assert!(counts.contains_key("b:1"), "{counts:?}");
    sleep(Duration::from_secs(5)).await;
    learn(&members, &[("b:1", PRIMARY, 121, 0)]);
    // An answer that comes late is not the newest.
    let late =
        MemberState { address: "b:1".to_owned(), role: SECONDARY, applied: at(90), lag: Duration::ZERO, seen: Instant::now() };
    sleep(Duration::from_secs(1)).await;
    learn(&members, &[("b:1", PRIMARY, 121, 0)]);
    members.learn(vec![late]).unwrap();
    assert_eq!(only(&members, &ReadRoute::primary().after(&token, "shop")), "b:1");
}

#[tokio::test(start_paused = true)]
async fn what_was_said_long_ago_is_not_believed_and_lag_grows_with_its_age() {
    let members = set(RouterSettings::default(), &SET);
    sleep(Duration::from_secs(3)).await;
    assert_eq!(only(&members, &ReadRoute::secondary_preferred().max_lag(Duration::from_secs(3))), "a:1");
    assert_eq!(only(&members, &ReadRoute::secondary_preferred().max_lag(Duration::from_secs(4))), "b:1");
    sleep(Duration::from_secs(3)).await;
    learn(&members, &[("b:1", PRIMARY, 120, 0)]);
    assert_eq!(only(&members, &ReadRoute::chain([Tier::Any])), "b:1");
    assert_eq!(only(&members, &ReadRoute::secondary()), "nobody");
    // Long after that it is not even known.
    sleep(Duration::from_secs(60)).await;
    learn(&members, &[("b:1", PRIMARY, 180, 0)]);
    assert_eq!(members.lock().len(), 1);
}

fn down() -> Error {
    Error::new(ErrorKind::Unavailable, "down")
}

#[tokio::test(start_paused = true)]
async fn a_read_goes_on_to_the_next_member_and_asks_each_once() {
    let members = set(RouterSettings::default(), &SET);
    let asked = Mutex::new(Vec::new());
    let fails_but = |good: &'static str| {
        let asked = &asked;
        move |target: Target| async move {
            asked.lock().unwrap().push(target.address.clone());
            if target.address == good { Ok(target.role) } else { Err(down()) }
        }
    };
    assert_eq!(members.read(&ReadRoute::secondary_preferred(), fails_but("a:1")).await.unwrap(), PRIMARY);
    let mut order = std::mem::take(&mut *asked.lock().unwrap());
    assert_eq!(order.pop().as_deref(), Some("a:1"));
    order.sort();
    assert_eq!(order, ["b:1", "c:1"]);
    let error = members.read(&ReadRoute::secondary(), fails_but("a:1")).await.unwrap_err();
    assert_eq!((error.kind(), asked.lock().unwrap().len()), (ErrorKind::Unavailable, 2));
    assert!(error.to_string().contains("member: "), "{error}");
    // What is wrong with the read itself is wrong everywhere.
    let count = AtomicU32::new(0);
    let anybody = ReadRoute::chain([Tier::Any]);
    let wrong = members.read(&anybody, |_| async {
        count.fetch_add(1, Relaxed);
        Err::<(), _>(Error::invalid("no such operator"))
    });
    assert_eq!((wrong.await.unwrap_err().kind(), count.load(Relaxed)), (ErrorKind::InvalidInput, 1));
    // Nor is there more time with another.
    let late = members.read(&anybody, |_| async {
        count.fetch_add(1, Relaxed);
        Err::<(), _>(Error::new(ErrorKind::Timeout, "late"))
    });
    assert_eq!((late.await.unwrap_err().kind(), count.load(Relaxed)), (ErrorKind::Timeout, 2));
}

#[tokio::test(start_paused = true)]
async fn a_member_that_fails_again_and_again_is_passed_over() {
    let members = set(RouterSettings::default(), &SET);
    let asked_b = AtomicU32::new(0);
    for _ in 0..200 {
        let work = |target: Target| {
            let is_b = target.address == "b:1";
            asked_b.fetch_add(u32::from(is_b), Relaxed);
            async move { if is_b { Err(down()) } else { Ok(()) } }
        };
        members.read(&ReadRoute::secondary_preferred(), work).await.unwrap();
    }
    assert_eq!(asked_b.load(Relaxed), BreakerSettings::default().failures_to_open);
    assert_eq!(only(&members, &ReadRoute::secondary()), "c:1");
}

/// Reads of whom who is asked serves after so many milliseconds; `None` never.
struct Readers<'a> {
    members: &'a Members,
    asked: Mutex<Vec<String>>,
    given_up: AtomicU32,
}

/// Counts who is dropped before its end.
struct GivenUp<'a>(&'a AtomicU32, bool);

impl Drop for GivenUp<'_> {
    fn drop(&mut self) {
        self.0.fetch_add(u32::from(self.1), Relaxed);
    }
}

impl<'a> Readers<'a> {
    fn new(members: &'a Members) -> Self {
        Self { members, asked: Mutex::default(), given_up: AtomicU32::new(0) }
    }

    async fn read(&self, route: &ReadRoute, serves: impl Fn(&str) -> (Option<u64>, Result<()>) + Send + Sync) -> Result<String> {
        let work = |target: Target| {
            self.asked.lock().unwrap().push(target.address.clone());
            let (millis, result) = serves(&target.address);
            async move {
                let mut given_up = GivenUp(&self.given_up, true);
                match millis {
                    Some(millis) => sleep(Duration::from_millis(millis)).await,
                    None => pending().await,
                }
                given_up.1 = false;
                result.map(|()| target.address)
            }
        };
        self.members.read(route, work).await
    }

    /// So that it is known that a read takes ten milliseconds.
    async fn warm_up(&self, route: &ReadRoute) {
        for _ in 0..64 {
            self.read(route, |_| (Some(10), Ok(()))).await.unwrap();
        }
        assert_eq!(std::mem::take(&mut *self.asked.lock().unwrap()).len(), 64);
    }
}

#[tokio::test(start_paused = true)]
async fn a_read_that_takes_long_is_asked_of_another_and_the_slower_one_is_dropped() {
    let metrics = MemoryMetrics::default();
    let members = Members::new(RouterSettings::default(), &metrics);
    learn(&members, &SET);
    let (readers, route) = (Readers::new(&members), ReadRoute::secondary_preferred().hedged("find"));
    readers.warm_up(&route).await;
    let hedges = |outcome| metrics.counter_value("mongo_workload_hedges_total", &[("outcome", outcome)]);
    // It is its turn in every second read.
    let mut reads = 64;
    while hedges("won") < Some(3) {
        let began = Instant::now();
        let by = readers.read(&route, |address| (if address == "b:1" { None } else { Some(10) }, Ok(()))).await.unwrap();
        assert_eq!(by, "c:1");
        assert!(began.elapsed() <= Duration::from_millis(21), "{:?}", began.elapsed());
        reads += 1;
    }
    let asked = readers.asked.lock().unwrap();
    let hung = asked.iter().filter(|address| *address == "b:1").count();
    assert!(hung == 3 && !asked.contains(&"a:1".to_owned()), "{asked:?}");
    assert_eq!(readers.given_up.load(Relaxed) as usize, hung);
    assert_eq!(hedges("lost"), Some(0));
    assert_eq!(metrics.counter_value("mongo_workload_routed_total", &[("outcome", "completed")]), Some(reads));
}

#[tokio::test(start_paused = true)]
async fn one_read_in_twenty_is_hedged_at_most_however_slow_all_are() {
    let members = set(RouterSettings::default(), &SET);
    let (readers, route) = (Readers::new(&members), ReadRoute::secondary().hedged("find"));
    readers.warm_up(&route).await;
    // Slower and slower, so that each takes longer than those before it took.
    for number in 0..400_u64 {
        learn(&members, &SET);
        readers.read(&route, |_| (Some(20 + number), Ok(()))).await.unwrap();
    }
    let asked = readers.asked.lock().unwrap().len();
    assert!((415..=400 + 20 + 10).contains(&asked), "{asked}");
}

#[tokio::test(start_paused = true)]
async fn a_second_member_is_one_that_is_fit_and_of_the_same_tier() {
    let members = set(RouterSettings::default(), &SET);
    let readers = Readers::new(&members);
    // The other secondary lags too much, and the primary is only for when there is no secondary.
    let route = ReadRoute::secondary_preferred().max_lag(Duration::from_secs(5)).hedged("find");
    readers.warm_up(&route).await;
    readers.read(&route, |_| (Some(1000), Ok(()))).await.unwrap();
    readers.read(&ReadRoute::primary().hedged("find"), |_| (Some(1000), Ok(()))).await.unwrap();
    assert_eq!(*readers.asked.lock().unwrap(), ["b:1", "a:1"]);
    // Nor is the second the primary where anybody may be asked.
    let anybody = ReadRoute::chain([Tier::Any]).max_lag(Duration::from_secs(5)).hedged("find");
    learn(&members, &[("c:1", SECONDARY, 90, 10)]);
    for _ in 0..4 {
        learn(&members, &SET);
        readers.read(&anybody, |address| (Some(if address == "b:1" { 1000 } else { 10 }), Ok(()))).await.unwrap();
    }
    let asked = std::mem::take(&mut *readers.asked.lock().unwrap());
    assert_eq!(asked.len(), 2 + 4, "{asked:?}");
    // Without a shape nothing is hedged.
    readers.read(&ReadRoute::secondary(), |_| (Some(1000), Ok(()))).await.unwrap();
    assert_eq!(readers.asked.lock().unwrap().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn if_one_of_two_fails_the_other_is_awaited() {
    let patient = BreakerSettings::default().with_failures_to_open(100);
    let members = set(RouterSettings { breaker: patient, ..RouterSettings::default() }, &SET);
    let (readers, route) = (Readers::new(&members), ReadRoute::chain([Tier::Secondaries]).hedged("find"));
    readers.warm_up(&route).await;
    let (down, late, wrong) = (Some(ErrorKind::Unavailable), Some(ErrorKind::Timeout), Some(ErrorKind::InvalidInput));
    // After so many milliseconds, how it ends with the one that is asked first and with the one that is asked second; and with the read.
    for (first, second, expected) in [
        ((30, down), (40, None), None),
        ((80, None), (20, down), None),
        ((30, late), (40, None), None),
        ((80, None), (20, late), None),
        ((30, down), (40, down), down),
        ((30, late), (40, down), late),
        ((30, down), (40, late), late),
        ((30, wrong), (400, None), wrong),
        ((400, None), (20, wrong), wrong),
    ] {
        learn(&members, &SET);
        let asked = AtomicU32::new(0);
        let serves = |_: &str| {
            let (millis, fails) = if asked.fetch_add(1, Relaxed) == 0 { first } else { second };
            (Some(millis), fails.map_or(Ok(()), |kind| Err(Error::new(kind, "on purpose"))))
        };
        let result = readers.read(&route, serves).await;
        assert_eq!((asked.into_inner(), result.err().map(|error| error.kind())), (2, expected), "{first:?} {second:?}");
    }
}
