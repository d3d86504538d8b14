use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use super::*;

const PRIMARY: MemberRole = MemberRole::Primary;
const SECONDARY: MemberRole = MemberRole::Secondary;

/// Address, role, the second of the last operation, lag in seconds.
type Said = (&'static str, MemberRole, u32, u64);

fn set(settings: RouterSettings, said: &[Said]) -> Members {
    let members = Members::new(settings);
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
