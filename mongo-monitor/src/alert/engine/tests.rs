//! Rounds of made-up numbers, by a clock that the test turns.

use proptest::prelude::*;

use super::*;
use crate::{MonitorSettings, Threshold, default_rules};

/// Numbers of metrics, by member and the metric's name.
#[derive(Default)]
struct Given {
    members: Vec<String>,
    numbers: BTreeMap<(String, String), f64>,
    /// Whether what is missing is not there, instead of not being known.
    is_whole: bool,
}

impl Given {
    fn of(numbers: &[(&str, &str, f64)]) -> Self {
        let members: BTreeSet<String> = numbers.iter().map(|(member, _, _)| (*member).to_owned()).collect();
        let numbers = numbers.iter().map(|(member, metric, number)| (((*member).to_owned(), (*metric).to_owned()), *number));
        Self { members: members.into_iter().collect(), numbers: numbers.collect(), is_whole: false }
    }

    fn without_numbers(mut self) -> Self {
        self.numbers.clear();
        self
    }
}

impl Readings for Given {
    fn members(&self) -> Vec<String> {
        self.members.clone()
    }

    fn values(&self, member: &str, quantity: &Quantity) -> Vec<(Vec<String>, f64)> {
        let number = self.numbers.get(&(member.to_owned(), quantity.metric.clone()));
        number.map(|number| (Vec::new(), *number)).into_iter().collect()
    }

    fn is_whole(&self, _: &str, _: &Quantity) -> bool {
        self.is_whole
    }

    fn has_all_members(&self) -> bool {
        !self.members.is_empty()
    }
}

fn at(seconds: i64) -> Moment {
    Moment { at: seconds * 1000, wall: DateTime::from_millis(1_000_000_000 + seconds * 1000) }
}

const METRIC: &str = "mongodb_wt_open_sessions";

fn rule() -> Rule {
    let each = Expression::Each(Quantity::of(METRIC));
    let mut rule = Rule::new("sessions", Severity::Warning, each, Threshold::Above(80.0), "too many");
    rule.clear = Some(75.0);
    rule.for_seconds = 60;
    rule.keep_firing_seconds = 30;
    rule
}

fn round(alerts: &mut Alerts, seconds: i64, number: f64) -> Vec<(AlertPhase, Option<f64>)> {
    let news = alerts.look(at(seconds), &Given::of(&[("a:1", METRIC, number)]));
    news.into_iter().map(|alert| (alert.phase, alert.value)).collect()
}

fn phases(alerts: &Alerts) -> Vec<AlertPhase> {
    alerts.active().into_iter().map(|alert| alert.phase).collect()
}

use AlertPhase::{Firing, Pending, Resolved};

#[test]
fn an_alert_is_pending_then_fires_is_told_once_and_again_much_later_and_is_resolved_once() {
    let mut alerts = Alerts::new(vec![rule()]).unwrap().with_repeat(Duration::from_secs(600));
    assert_eq!(round(&mut alerts, 0, 90.0), []);
    assert_eq!(phases(&alerts), [Pending]);
    assert_eq!(round(&mut alerts, 59, 90.0), []);
    assert_eq!(round(&mut alerts, 60, 91.0), [(Firing, Some(91.0))]);
    assert_eq!(alerts.active()[0].since, DateTime::from_millis(1_000_000_000));
    assert_eq!(round(&mut alerts, 659, 91.0), []);
    assert_eq!(round(&mut alerts, 660, 92.0), [(Firing, Some(92.0))]);
    // Between the thresholds it goes on.
    assert_eq!(round(&mut alerts, 700, 77.0), []);
    assert_eq!(phases(&alerts), [Firing]);
    // Well, and for long enough; a relapse in between begins anew.
    assert_eq!(round(&mut alerts, 710, 70.0), []);
    assert_eq!(round(&mut alerts, 730, 85.0), []);
    assert_eq!(round(&mut alerts, 740, 70.0), []);
    assert_eq!(round(&mut alerts, 769, 70.0), []);
    assert_eq!(round(&mut alerts, 770, 70.0), [(Resolved, Some(70.0))]);
    assert_eq!(round(&mut alerts, 780, 70.0), []);
    assert!(alerts.active().is_empty());
}

#[test]
fn an_outage_is_told_at_once_and_not_member_by_member() {
    let mut alerts = Alerts::new(vec![Rule { for_seconds: 0, keep_firing_seconds: 0, ..rule() }]).unwrap();
    alerts = alerts.with_group_wait(Duration::from_secs(30)).with_repeat(Duration::from_secs(600));
    let mut look = |seconds: i64, numbers: [f64; 3]| {
        let members = ["a:1", "b:1", "c:1"].iter().zip(numbers).map(|(member, number)| (*member, METRIC, number));
        let news = alerts.look(at(seconds), &Given::of(&members.collect::<Vec<_>>()));
        news.into_iter().map(|alert| (alert.member.unwrap(), alert.phase)).collect::<Vec<_>>()
    };
    let told =
        |members: &[&str], phase: AlertPhase| -> Vec<_> { members.iter().map(|member| ((*member).to_owned(), phase)).collect() };
    assert_eq!(look(0, [90.0, 10.0, 10.0]), []);
    assert_eq!(look(10, [90.0, 90.0, 10.0]), []);
    // What is over before it was told was nothing.
    assert_eq!(look(20, [90.0, 10.0, 90.0]), []);
    assert_eq!(look(30, [90.0, 10.0, 90.0]), told(&["a:1", "c:1"], Firing));
    assert_eq!(look(40, [90.0, 90.0, 10.0]), told(&["c:1"], Resolved), "what is over waits for nothing");
    assert_eq!(look(70, [90.0, 90.0, 10.0]), told(&["b:1"], Firing));
    assert_eq!(look(100, [90.0, 90.0, 10.0]), []);
    // What is told again waits for nothing, and takes along nothing new.
    assert_eq!(look(629, [90.0, 90.0, 10.0]), []);
    assert_eq!(look(630, [90.0, 90.0, 10.0]), told(&["a:1"], Firing));
    assert_eq!(look(670, [90.0, 90.0, 90.0]), told(&["b:1"], Firing));
    assert_eq!(look(700, [90.0, 90.0, 90.0]), told(&["c:1"], Firing));
}

#[test]
fn what_another_explains_has_waited_for_its_group_meanwhile() {
    let each = |metric: &str| Expression::Each(Quantity::of(metric));
    let cause = Rule::new("cause", Severity::Critical, each(METRIC), Threshold::Above(80.0), "the cause");
    let mut effect = Rule::new("effect", Severity::Warning, each("mongodb_up"), Threshold::Below(0.5), "the effect");
    effect.inhibited_by = vec!["cause".to_owned()];
    let mut alerts = Alerts::new(vec![cause, effect]).unwrap().with_group_wait(Duration::from_secs(30));
    let mut look = |seconds: i64, cause: f64| {
        let news = alerts.look(at(seconds), &Given::of(&[("a:1", METRIC, cause), ("a:1", "mongodb_up", 0.0)]));
        news.into_iter().map(|alert| (alert.rule, alert.phase)).collect::<Vec<_>>()
    };
    assert_eq!(look(0, 90.0), []);
    assert_eq!(look(30, 90.0), [("cause".to_owned(), Firing)]);
    assert_eq!(
        look(60, 10.0),
        [("cause".to_owned(), Resolved), ("effect".to_owned(), Firing)],
        "no all-clear without what is left"
    );
}

#[test]
fn a_group_waits_no_longer_for_a_restart_and_not_for_what_is_well_again() {
    let lasting = Rule { for_seconds: 0, keep_firing_seconds: 300, ..rule() };
    let mut alerts = Alerts::new(vec![lasting.clone()]).unwrap().with_group_wait(Duration::from_secs(30));
    assert_eq!(round(&mut alerts, 0, 90.0), []);
    assert_eq!(round(&mut alerts, 25, 90.0), []);
    let mut anew = Alerts::new(vec![lasting]).unwrap().with_group_wait(Duration::from_secs(30));
    anew.restore(serde_json::from_value(serde_json::to_value(alerts.save()).unwrap()).unwrap());
    assert_eq!(round(&mut anew, 30, 10.0), [], "it is well");
    assert_eq!(round(&mut anew, 35, 90.0), [(Firing, Some(90.0))]);
}

#[test]
fn what_was_only_pending_is_never_told() {
    let mut alerts = Alerts::new(vec![rule()]).unwrap();
    round(&mut alerts, 0, 90.0);
    assert_eq!(round(&mut alerts, 30, 79.0), []);
    assert!(alerts.active().is_empty(), "the threshold for those that fire is not that of those that wait");
    round(&mut alerts, 40, 90.0);
    assert_eq!(round(&mut alerts, 99, 90.0), []);
    assert_eq!(round(&mut alerts, 100, 90.0), [(Firing, Some(90.0))]);
}

#[test]
fn what_cannot_be_read_resolves_nothing_and_lets_nothing_begin_to_fire() {
    let nothing = || Given::of(&[("a:1", METRIC, 0.0)]).without_numbers();
    let mut alerts = Alerts::new(vec![rule()]).unwrap();
    round(&mut alerts, 0, 90.0);
    alerts.look(at(50), &nothing());
    assert!(alerts.look(at(1000), &nothing()).is_empty());
    assert!(!alerts.active()[0].has_data);
    // Of the minute nothing was left over but what was seen.
    assert_eq!(round(&mut alerts, 1001, 90.0), []);
    assert_eq!(round(&mut alerts, 1060, 90.0), [(Firing, Some(90.0))]);
    assert!(alerts.look(at(5000), &nothing()).is_empty());
    assert_eq!(phases(&alerts), [Firing]);
    // A member that was taken out of the set has no troubles any more.
    let news = alerts.look(at(5010), &Given::of(&[("b:1", METRIC, 0.0)]));
    assert_eq!(news.iter().map(|alert| alert.phase).collect::<Vec<_>>(), [Resolved]);
}

#[test]
fn what_another_alert_explains_is_told_when_that_is_over() {
    let down = Rule::new("down", Severity::Critical, Expression::Each(Quantity::of("mongodb_up")), Threshold::Below(0.5), "gone");
    let mut slow = rule();
    (slow.for_seconds, slow.keep_firing_seconds, slow.inhibited_by) = (0, 0, vec!["down".to_owned()]);
    let mut alerts = Alerts::new(vec![slow, down]).unwrap();
    let mut look = |seconds: i64, up: f64, other_up: f64| {
        let given = [("a:1", METRIC, 90.0), ("a:1", "mongodb_up", up), ("b:1", "mongodb_up", other_up)];
        alerts.look(at(seconds), &Given::of(&given)).into_iter().map(|alert| (alert.id, alert.phase)).collect::<Vec<_>>()
    };
    let told = |id: &str, phase: AlertPhase| (id.to_owned(), phase);
    assert_eq!(look(0, 0.0, 1.0), [told("down of a:1", Firing)]);
    assert_eq!(look(10, 1.0, 1.0), [told("down of a:1", Resolved), told("sessions of a:1", Firing)]);
    // Another member's trouble explains nothing.
    assert_eq!(look(20, 1.0, 0.0), [told("down of b:1", Firing)]);
}

#[test]
fn a_silence_ends() {
    let mut immediate = rule();
    immediate.for_seconds = 0;
    let mut alerts = Alerts::new(vec![immediate]).unwrap();
    let mut silence = Silence::until(at(100).wall, "upgrade");
    silence.member = Some("a:1".to_owned());
    alerts.silence(silence);
    assert_eq!(round(&mut alerts, 0, 90.0), []);
    assert_eq!(alerts.active()[0].muted.as_deref(), Some("silenced: upgrade"));
    assert_eq!(round(&mut alerts, 99, 90.0), []);
    assert_eq!(round(&mut alerts, 101, 90.0), [(Firing, Some(90.0))]);
}

#[test]
fn a_restart_tells_nothing_twice_and_forgets_nothing() {
    let mut alerts = Alerts::new(vec![rule()]).unwrap();
    round(&mut alerts, 0, 90.0);
    round(&mut alerts, 60, 90.0);
    let state: AlertState = serde_json::from_str(&serde_json::to_string(&alerts.save()).unwrap()).unwrap();
    // The monotonic clock of another process begins at nothing.
    let mut anew = Alerts::new(vec![rule()]).unwrap();
    anew.restore(state.clone());
    assert_eq!(anew.save(), state, "saved again before anything was looked at");
    let later = |seconds: i64| Moment { at: (seconds - 100) * 1000, ..at(seconds) };
    assert!(anew.look(later(100), &Given::of(&[("a:1", METRIC, 90.0)])).is_empty(), "it was told before");
    assert_eq!((phases(&anew), anew.active()[0].since), (vec![Firing], at(0).wall));
    let _ = anew.look(later(110), &Given::of(&[("a:1", METRIC, 10.0)]));
    let news = anew.look(later(140), &Given::of(&[("a:1", METRIC, 10.0)]));
    assert_eq!(news[0].phase, Resolved);
}

#[test]
fn rules_that_make_no_sense_are_refused_and_the_reason_is_named() {
    let refused = |change: &dyn Fn(&mut Rule)| {
        let mut rule = rule();
        change(&mut rule);
        Alerts::new(vec![rule]).map(drop).unwrap_err().to_string()
    };
    assert!(refused(&|rule| rule.clear = Some(90.0)).contains("well again"));
    assert!(refused(&|rule| rule.expression = Expression::Each(Quantity::of("mongodb_nonsense"))).contains("does not exist"));
    assert!(refused(&|rule| rule.expression = Expression::Each(Quantity::of("mongodb_ttl_passes_total"))).contains("rate"));
    assert!(refused(&|rule| rule.expression = Expression::Each(Quantity::of(METRIC).with("kind", "x"))).contains("label"));
    assert!(refused(&|rule| rule.threshold = Threshold::Above(f64::NAN)).contains("number"));
    assert!(refused(&|rule| rule.inhibited_by = vec!["other".to_owned()]).contains("does not exist"));
    assert!(Alerts::new(vec![rule(), rule()]).is_err());
}

#[test]
fn the_rules_that_come_with_it_are_sound_and_survive_being_written_down() {
    let rules = default_rules(&MonitorSettings::default());
    Alerts::new(rules.clone()).unwrap();
    let again: Vec<Rule> = serde_json::from_str(&serde_json::to_string(&rules).unwrap()).unwrap();
    assert_eq!(again, rules);
}

proptest! {
    #[test]
    fn firing_and_resolved_are_told_in_turn(
        steps in proptest::collection::vec((1..40_i64, proptest::option::of(60..100_u32)), 1..100),
    ) {
        let mut alerts = Alerts::new(vec![rule()]).unwrap().with_repeat(Duration::from_secs(1_000_000));
        let (mut seconds, mut fires, mut above_since) = (0, false, None);
        for (passed, number) in steps {
            seconds += passed;
            let given = match number {
                Some(number) => Given::of(&[("a:1", METRIC, f64::from(number))]),
                None => Given::of(&[("a:1", METRIC, 0.0)]).without_numbers(),
            };
            match number {
                Some(81..) => above_since = above_since.or(Some(seconds)),
                Some(_) => above_since = None,
                None => {}
            }
            for alert in alerts.look(at(seconds), &given) {
                match alert.phase {
                    Firing => {
                        prop_assert!(!fires && above_since.is_some_and(|since| seconds - since >= 60));
                        fires = true;
                    }
                    _ => {
                        prop_assert!(fires && number.is_some_and(|number| number <= 75));
                        fires = false;
                    }
                }
            }
        }
    }
}

#[test]
fn an_alert_whose_series_has_ended_is_over_and_one_that_cannot_be_read_is_not() {
    let mut alerts = Alerts::new(vec![rule()]).unwrap();
    round(&mut alerts, 0, 90.0);
    assert_eq!(round(&mut alerts, 60, 90.0), [(Firing, Some(90.0))]);
    let mut given = Given::of(&[("a:1", METRIC, 90.0)]).without_numbers();
    assert!(alerts.look(at(120), &given).is_empty());
    assert_eq!(phases(&alerts), [Firing]);
    given.is_whole = true;
    let news = alerts.look(at(180), &given);
    assert_eq!(news.iter().map(|alert| alert.phase).collect::<Vec<_>>(), [Resolved]);
}

#[test]
fn where_nothing_happens_no_ratio_is_alarming_and_none_sticks() {
    let of = |name: &str| vec![Quantity::of(name).rate_over(300)];
    let expression = Expression::Ratio { of: of("mongodb_query_scanned_keys_total"), to: of("mongodb_network_requests_total") };
    let mut alerts =
        Alerts::new(vec![Rule::new("targeting", Severity::Warning, expression, Threshold::Above(10.0), "")]).unwrap();
    let mut round = |second: i64, scanned: f64, requests: f64| {
        let numbers = [("a:1", "mongodb_query_scanned_keys_total", scanned), ("a:1", "mongodb_network_requests_total", requests)];
        alerts.look(at(second), &Given::of(&numbers)).into_iter().map(|alert| alert.phase).collect::<Vec<_>>()
    };
    assert_eq!(round(0, 0.0, 0.0), []);
    assert_eq!(round(10, 100.0, 1.0), [Firing]);
    assert_eq!(round(20, 0.0, 0.0), [Resolved]);
    assert_eq!(round(30, 100.0, 0.0), [Firing], "much for nothing is worse");
}
