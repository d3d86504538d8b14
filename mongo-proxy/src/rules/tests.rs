//! Rules as data, and what they say of requests.

use std::collections::BTreeSet;

use bson::{Document, doc};
use mongo_core::metrics::{MemoryMetrics, NoMetrics};
use proptest::prelude::*;

use super::{
    book::Facts,
    limits::{MOST_KEYS, NoSlot, Rates, Slots},
    *,
};
use crate::command::Command;

fn who(address: &str, application: &str, users: &[&str]) -> Who {
    Who {
        address: address.parse().unwrap(),
        application: (!application.is_empty()).then(|| application.to_owned()),
        users: users.iter().map(ToString::to_string).collect(),
    }
}

fn book(rules: &[Rule]) -> RuleBook {
    RuleBook::new(&Rules::new(rules.to_vec()), 1, None, &NoMetrics).unwrap()
}

/// The names of the rules that have something to do with a request.
fn ruled(book: &RuleBook, who: &Who, command: &Document) -> Vec<String> {
    let body = command.to_vec().unwrap();
    let command = Command::read(&body, None).unwrap();
    let facts: Facts<'_> = book.facts(&command, &[], who);
    book.rule(&facts, Duration::ZERO).rules.iter().map(|(rule, _)| rule.rule.name.clone()).collect()
}

fn deny(name: &str, matches: Match) -> Rule {
    Rule::new(name, [Action::Deny(Denial::Unauthorized)]).with_match(matches)
}

fn allow(name: &str, matches: Match) -> Rule {
    Rule::new(name, [Action::Allow]).with_match(matches)
}

#[test]
fn each_field_of_a_match_holds_or_not() {
    let ada = who("10.1.2.3", "shop", &["admin.ada"]);
    let find = doc! { "find": "orders", "$db": "shop" };
    let holds = |matches: Match, who: &Who, command: &Document| !ruled(&book(&[deny("x", matches)]), who, command).is_empty();
    let here = |matches: Match| holds(matches, &ada, &find);
    assert!(here(Match::default()));
    assert!(here(Match::default().commands(["insert", "find"])) && !here(Match::default().commands(["insert"])));
    assert!(here(Match::default().namespaces(["shop.ord*"])) && !here(Match::default().namespaces(["shop.users", "x.*"])));
    assert!(here(Match::default().namespaces(["shop"])) && !here(Match::default().namespaces(["sho"])));
    assert!(here(Match::default().users(["admin.a*"])) && !here(Match::default().users(["shop.ada"])));
    assert!(here(Match::default().applications(["sh*"])) && !here(Match::default().applications(["sh"])));
    assert!(here(Match::default().networks(["192.0.2.7", "10.0.0.0/8"])) && !here(Match::default().networks(["10.1.2.4"])));
    assert!(here(Match::default().access(Access::Read)) && !here(Match::default().access(Access::Write)));
    assert!(here(Match::default().in_transaction(false)) && !here(Match::default().in_transaction(true)));
    // All that are set must hold.
    assert!(!here(Match::default().commands(["find"]).access(Access::Write)));
    // Who is not logged in is nobody, and who has no name has none.
    let stranger = who("::ffff:10.1.2.3", "", &[]);
    assert!(!holds(Match::default().users(["*"]), &stranger, &find));
    assert!(holds(Match::default().applications(["*"]), &stranger, &find));
    let in_transaction = doc! { "find": "orders", "autocommit": false, "$db": "shop" };
    assert!(holds(Match::default().in_transaction(true), &ada, &in_transaction));
    // What is to be explained is meant with it, and so it is by its other name.
    let explain = doc! { "explain": { "aggregate": "orders" }, "$db": "shop" };
    assert!(holds(Match::default().commands(["aggregate"]), &ada, &explain));
    assert!(holds(Match::default().commands(["explain"]), &ada, &explain));
    assert!(!holds(Match::default().commands(["find"]), &ada, &explain));
    let modify = doc! { "findandmodify": "orders", "$db": "shop" };
    assert!(holds(Match::default().commands(["findAndModify"]), &ada, &modify));
}

#[test]
fn the_first_rule_that_matches_decides() {
    let ada = who("10.1.2.3", "", &["admin.ada"]);
    let book = book(&[
        allow("reads", Match::default().access(Access::Read)),
        deny("ada writes nothing", Match::default().users(["admin.ada"])),
        deny("nobody drops", Match::default().commands(["drop"])),
    ]);
    assert_eq!(ruled(&book, &ada, &doc! { "find": "a", "$db": "d" }), ["reads"]);
    assert_eq!(ruled(&book, &ada, &doc! { "drop": "a", "$db": "d" }), ["ada writes nothing"]);
    assert_eq!(ruled(&book, &who("10.1.2.3", "", &[]), &doc! { "drop": "a", "$db": "d" }), ["nobody drops"]);
    assert!(ruled(&book, &who("10.1.2.3", "", &[]), &doc! { "insert": "a", "$db": "d" }).is_empty());
}

#[test]
fn what_is_forbidden_cannot_be_had_beside_what_is_allowed() {
    let anybody = who("10.1.2.3", "", &[]);
    let everything_else = deny("all else", Match::default());
    let book = book(&[
        Rule::new("slowly", [Action::LimitRate(RateRule::new(1.0, 1))]).with_match(Match::default().namespaces(["shop.orders"])),
        deny("secrets", Match::default().namespaces(["*.secrets"])),
        allow("shop", Match::default().namespaces(["shop.*"])),
        everything_else,
    ]);
    let ruled = |command: &Document| ruled(&book, &anybody, command);
    let lookup = |from: &str| doc! { "aggregate": "orders", "pipeline": [{ "$lookup": { "from": from } }], "$db": "shop" };
    assert_eq!(ruled(&doc! { "find": "orders", "$db": "shop" }), ["slowly"]);
    // It is slowed down all the same, and asked further.
    assert_eq!(ruled(&lookup("users")), ["slowly", "shop"]);
    assert_eq!(ruled(&lookup("secrets")), ["slowly", "secrets"]);
    let union = doc! { "aggregate": "a", "pipeline": [{ "$unionWith": "b" }, { "$merge": { "into": { "db": "other", "coll": "c" } } }], "$db": "shop" };
    // Allowed in part is not allowed.
    assert_eq!(ruled(&union), ["shop", "all else"]);
    // As a whole a database is what none of its collections may be denied of.
    assert_eq!(ruled(&doc! { "dropDatabase": 1, "$db": "shop" }), ["slowly", "secrets"]);
    assert_eq!(ruled(&doc! { "renameCollection": "shop.secrets", "to": "shop.x", "$db": "admin" }), ["secrets"]);
    assert_eq!(
        ruled(&doc! { "aggregate": 1, "pipeline": [{ "$changeStream": { "allChangesForCluster": true } }], "$db": "admin" }),
        ["slowly", "secrets"]
    );
    assert_eq!(ruled(&doc! { "listCollections": 1, "$db": "other" }), ["secrets"]);
    // What is about the server is about none of them.
    assert_eq!(ruled(&doc! { "buildInfo": 1, "$db": "admin" }), ["all else"]);
}

#[test]
fn nothing_is_asked_about_what_begins_goes_on_or_ends() {
    let book = book(&[deny("all", Match::default())]);
    for name in [
        "hello",
        "ismaster",
        "ping",
        "saslStart",
        "saslContinue",
        "authenticate",
        "logout",
        "getMore",
        "killCursors",
        "commitTransaction",
        "abortTransaction",
        "endSessions",
        "killSessions",
        "refreshSessions",
    ] {
        assert!(ruled(&book, &who("10.1.2.3", "", &[]), &doc! { name: 1, "$db": "admin" }).is_empty(), "{name}");
        assert!(Rules::new([deny("x", Match::default().commands([name]))]).check().is_err(), "{name}");
    }
    assert!(!ruled(&book, &who("10.1.2.3", "", &[]), &doc! { "killAllSessions": [], "$db": "admin" }).is_empty());
}

#[test]
fn rules_that_only_observe_count_and_decide_nothing() {
    let observing = [
        deny("denies", Match::default()).observing_only(),
        Rule::new("limits", [Action::LimitRate(RateRule::new(0.001, 1))]).observing_only(),
        Rule::new("slots", [Action::LimitConcurrency(ConcurrencyRule::new(1))]).observing_only(),
        Rule::new("tags", [Action::Tag("x".to_owned())]).observing_only(),
    ];
    let book = book(&observing);
    let body = doc! { "find": "a", "$db": "d" }.to_vec().unwrap();
    let command = Command::read(&body, None).unwrap();
    let anybody = who("10.1.2.3", "", &[]);
    let facts = book.facts(&command, &[], &anybody);
    let first = book.rule(&facts, Duration::ZERO);
    assert!(first.is_pass() && first.observed.len() == 1);
    let second = book.rule(&facts, Duration::ZERO);
    assert!(second.is_pass() && second.observed.is_empty() && second.rewriting() == (None, None));
    let counted: Vec<(u64, u64)> =
        book.rules.iter().map(|rule| (rule.tally.matched.value(), rule.tally.observed.value())).collect();
    assert_eq!(counted, [(2, 2), (2, 1), (2, 1), (2, 0)]);
    // Whoever is done gives a place back here as well.
    drop(first);
    assert_eq!(book.rule(&facts, Duration::ZERO).observed.len(), 1);
}

#[test]
fn rules_are_read_from_json_and_written_as_they_were_read() {
    let text = r#"{ "rules": [
        { "name": "a", "match": { "commands": ["find"], "namespaces": ["shop.*"], "users": ["admin.ada"], "applications": ["x*"],
                                  "networks": ["10.0.0.0/8", "::1"], "access": "read", "in_transaction": false },
          "actions": [{ "delay": 0.05 }, { "limit_rate": { "per_second": 50, "burst": 100, "key": "client", "wait_at_most": 0.2 } },
                      { "limit_concurrency": { "at_once": 4, "key": "user", "max_waiting": 7, "wait_at_most": 1 } },
                      { "clamp_max_time": 5 }, { "tag": "by the proxy" }] },
        { "name": "b", "actions": ["allow"] },
        { "name": "c", "actions": [{ "deny": "read_only" }], "observe_only": true }
    ] }"#;
    let rules = Rules::from_json(text).unwrap();
    assert_eq!(rules.rules[0].actions[0], Action::Delay(Duration::from_millis(50)));
    let Action::LimitConcurrency(limit) = &rules.rules[0].actions[2] else { panic!("{:?}", rules.rules[0]) };
    assert_eq!((limit.at_once, limit.key, limit.max_waiting, limit.wait_at_most), (4, Key::User, 7, Duration::from_secs(1)));
    assert!(rules.rules[2].observe_only && rules.rules[1].matches == Match::default());
    assert_eq!(Rules::from_json(&serde_json::to_string(&rules).unwrap()).unwrap(), rules);
    assert_eq!(serde_json::to_string(&rules.rules[1]).unwrap(), r#"{"name":"b","actions":["allow"]}"#);
}

#[test]
fn rules_that_cannot_be_meant_are_refused_and_it_is_said_why() {
    let rule = |rest: &str| format!(r#"{{ "rules": [{{ "name": "r", {rest} }}] }}"#);
    let matching = |matches: &str| rule(&format!(r#""match": {{ {matches} }}, "actions": ["allow"]"#));
    let acting = |actions: &str| rule(&format!(r#""actions": [{actions}]"#));
    let cases = [
        ("{".to_owned(), "EOF"),
        (matching(r#""comands": ["find"]"#), "unknown field `comands`"),
        (matching(r#""commands": ["dropdatabase"]"#), "as: dropDatabase"),
        (matching(r#""commands": ["getMore"]"#), "always let through"),
        (matching(r#""commands": [""]"#), "called by its name"),
        (matching(r#""namespaces": [""]"#), "pattern is empty"),
        (matching(r#""users": ["ada"]"#), "database.user"),
        (matching(r#""networks": ["10.0.0.0/33"]"#), "10.0.0.0/33"),
        (matching(r#""access": "reads""#), "reads"),
        (acting(""), "does nothing"),
        (acting(r#""allow", { "delay": 1 }"#), "nothing else"),
        (acting(r#"{ "delay": 1 }, { "delay": 2 }"#), "twice"),
        (acting(r#"{ "deny": "gently" }"#), "gently"),
        (acting(r#"{ "delay": -1 }"#), "number of seconds"),
        (acting(r#"{ "delay": 4000 }"#), "hour"),
        (acting(r#"{ "limit_rate": { "per_second": 0 } }"#), "above 0"),
        (acting(r#"{ "limit_rate": { "per_second": 1, "burst": 0 } }"#), "burst"),
        (acting(r#"{ "limit_concurrency": { "at_once": 0 } }"#), "denied"),
        (acting(r#"{ "clamp_max_time": 0 }"#), "millisecond"),
        (acting(r#"{ "tag": "" }"#), "comment"),
        (r#"{ "rules": [{ "name": " ", "actions": ["allow"] }] }"#.to_owned(), "needs a name"),
        (
            r#"{ "rules": [{ "name": "r", "actions": ["allow"] }, { "name": "r", "actions": ["allow"] }] }"#.to_owned(),
            "same name",
        ),
    ];
    for (text, why) in cases {
        let error = Rules::from_json(&text).unwrap_err();
        assert!(error.report().contains(why), "{text}: {}", error.report());
        // What could be read is wrong in some rule, and that is named.
        let is_read = serde_json::from_str::<Rules>(&text).is_ok();
        assert_eq!(error.to_string().contains("rule: "), is_read, "{text}: {error}");
    }
    // What later servers know may have a rule.
    Rules::from_json(&matching(r#""commands": ["commandOfTomorrow"]"#)).unwrap();
}

#[test]
fn rules_that_stay_as_they_are_keep_what_they_have_seen() {
    let metrics = MemoryMetrics::default();
    let limit = Rule::new("limit", [Action::LimitRate(RateRule::new(0.001, 1))]);
    let before = RuleBook::new(&Rules::new([limit.clone(), allow("a", Match::default())]), 1, None, &metrics).unwrap();
    let anybody = who("10.1.2.3", "", &[]);
    let find = doc! { "find": "a", "$db": "d" };
    ruled(&before, &anybody, &find);
    let mut changed = limit.clone();
    changed.matches = Match::default().access(Access::Read);
    for (rule, seen) in [(limit, 1), (changed, 0)] {
        let after = RuleBook::new(&Rules::new([rule]), 2, Some(&before), &metrics).unwrap();
        assert_eq!(after.rules[0].tally.matched.value(), seen);
    }
    let labels = [("outcome", "matched"), ("rule", "limit")];
    assert_eq!(metrics.counter_value("mongo_proxy_rule_requests_total", &labels), Some(1));
}

#[test]
fn limits_are_of_those_that_they_are_keyed_by() {
    let rule = |key| Rule::new("r", [Action::LimitRate(RateRule::new(0.001, 1).keyed(key))]);
    let everybody = [
        who("10.0.0.1", "shop", &["admin.ada"]),
        who("10.0.0.1", "shop", &["admin.bob"]),
        who("10.0.0.2", "till", &["admin.ada"]),
        who("2001:db8::1", "till", &[]),
        who("2001:db8::2", "", &[]),
    ];
    for (key, number) in [(Key::All, 1), (Key::Client, 3), (Key::User, 3), (Key::Application, 3), (Key::Namespace, 2)] {
        let book = book(&[rule(key)]);
        let mut keys = BTreeSet::new();
        for (who, collection) in everybody.iter().zip(["a", "a", "b", "b", "a"]) {
            let body = doc! { "find": collection, "$db": "d" }.to_vec().unwrap();
            let command = Command::read(&body, None).unwrap();
            let ruling = book.rule(&book.facts(&command, &[], who), Duration::ZERO);
            keys.insert(ruling.rules[0].1[0].clone());
        }
        assert_eq!(keys.len(), number, "{key:?}: {keys:?}");
    }
}

#[test]
fn whoever_brings_ever_new_keys_shares_one_limit_in_the_end() {
    let rates = Rates::new(Rate::new(0.001, 1));
    let mut admitted = 0;
    for number in 0..MOST_KEYS + 500 {
        if let Ok((_, turn)) = rates.admit(&number.to_string(), Duration::ZERO, Duration::ZERO) {
            turn.used();
            admitted += 1;
        }
    }
    assert_eq!(admitted, MOST_KEYS + 1);
    // Once those that were there have rested, there is room again.
    let later = Duration::from_secs(2000);
    assert!(rates.admit("new", later, Duration::ZERO).is_ok() && rates.admit("newer", later, Duration::ZERO).is_ok());
}

#[test]
fn a_turn_that_was_not_used_is_anothers() {
    let rates = Rates::new(Rate::new(0.001, 1));
    let (now, patience) = (Duration::ZERO, Duration::ZERO);
    drop(rates.admit("k", now, patience).unwrap());
    rates.admit("k", now, patience).unwrap().1.used();
    assert!(rates.admit("k", now, patience).is_err());
}

#[tokio::test(start_paused = true)]
async fn so_many_have_a_place_and_so_many_wait_for_one() {
    let slots = std::sync::Arc::new(Slots::new(2, 1));
    let (now, patience) = (Duration::ZERO, Duration::from_secs(5));
    let first = slots.take("k", now, patience).await.unwrap();
    let _second = slots.take("k", now, patience).await.unwrap();
    assert_eq!(slots.take("k", now, Duration::ZERO).await.unwrap_err(), NoSlot::Late);
    let waits = tokio::spawn({
        let slots = std::sync::Arc::clone(&slots);
        async move { slots.take("k", now, patience).await }
    });
    tokio::task::yield_now().await;
    assert_eq!(slots.take("k", now, patience).await.unwrap_err(), NoSlot::Full);
    // Another's are another's.
    assert!(!slots.take("other", now, Duration::ZERO).await.unwrap().1);
    drop(first);
    let (third, had_to_wait) = waits.await.unwrap().unwrap();
    assert!(had_to_wait);
    assert_eq!(slots.take("k", now, patience).await.unwrap_err(), NoSlot::Late);
    // Who goes away while it waits leaves room for another.
    drop(tokio::time::timeout(Duration::from_secs(1), slots.take("k", now, patience)).await);
    let (_fourth, ()) = tokio::join!(slots.take("k", now, patience), async { drop(third) });
}

proptest! {
    #[test]
    fn what_a_rule_denies_is_denied_wherever_it_stands_in_a_pipeline(
        before in proptest::collection::vec("[a-c]", 0..4),
        stage in 0_usize..5,
        depth in 0_usize..4,
    ) {
        let hidden = match stage {
            0 => doc! { "$lookup": { "from": "secret", "as": "x" } },
            1 => doc! { "$unionWith": { "coll": "secret", "pipeline": [] } },
            2 => doc! { "$graphLookup": { "from": "secret" } },
            3 => doc! { "$out": "secret" },
            _ => doc! { "$merge": { "into": "secret" } },
        };
        let mut pipeline: Vec<Document> = before.iter().map(|from| doc! { "$lookup": { "from": from } }).collect();
        pipeline.push((0..depth).fold(hidden, |inner, _| doc! { "$facet": { "f": [inner] } }));
        let rules = [allow("open", Match::default().namespaces(["d.a", "d.b", "d.c"])), deny("secret", Match::default().namespaces(["d.secret"]))];
        let names = ruled(&book(&rules), &who("10.0.0.1", "", &[]), &doc! { "aggregate": "a", "pipeline": pipeline, "$db": "d" });
        prop_assert_eq!(names.last().map(String::as_str), Some("secret"));
    }
}
