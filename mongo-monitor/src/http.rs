//! An HTTP interface that a host mounts into its own server.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use axum::{
    Json, Router,
    extract::{Query, State},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use serde::{Deserialize, Serialize};

use crate::{
    alert::{Alert, AlertPhase, Severity},
    charts::{Chart, charts},
    failover::FailoverEvent,
    history::Summary,
    metric::Kind,
    monitor::{MemberView, Monitor, View},
    open_metrics::OPEN_METRICS_CONTENT_TYPE,
};

/// Routes for [axum](https://docs.rs/axum) that show what a monitor has read:
///
/// | route | what | status |
/// |---|---|---|
/// | `/health` | how the deployment is: members up, alerts by severity | 200; 503 if nobody is up |
/// | `/ready` | whether somebody takes writes | 200, or 503 |
/// | `/metrics` | everything, for Prometheus | 200 |
/// | `/api/replication/status` | the members: state, lag, health | 200 |
/// | `/api/dashboard?range=SECONDS` | all that was read last, what it was over a while (default 900 s), what is to be drawn of it, failovers and alerts | 200; 400 for a range that is none |
/// | `/dashboard` | a page that shows that, and goes on showing it; it loads a style sheet and scripts from beside it | 200 |
///
/// No route asks the servers: an answer takes as long as copying it. None shows documents or credentials, but whoever can read them learns hosts, names of
/// collections in slow operations, and load: mount them where only those come who may know that.
///
/// ```no_run
/// # async fn f(monitor: mongo_monitor::Monitor) -> Result<(), Box<dyn std::error::Error>> {
/// let app = axum::Router::new().nest("/mongo", mongo_monitor::router(std::sync::Arc::new(monitor)));
/// let listener = tokio::net::TcpListener::bind("127.0.0.1:9216").await?;
/// axum::serve(listener, app).await?;
/// # Ok(()) }
/// ```
pub fn router(monitor: Arc<Monitor>) -> Router {
    Router::new()
        .route("/health", get(health))
        .route("/ready", get(ready))
        .route("/metrics", get(metrics))
        .route("/api/replication/status", get(replication_status))
        .route("/api/dashboard", get(dashboard))
        .merge(PAGE.iter().fold(Router::new(), |router, (path, kind, text)| router.route(path, get(async || page(kind, text)))))
        .with_state(monitor)
}

/// How the deployment is.
#[derive(Serialize)]
struct Health {
    status: &'static str,
    members: usize,
    members_up: usize,
    primary: Option<String>,
    critical: usize,
    warnings: usize,
}

impl Health {
    fn of(monitor: &Monitor) -> Self {
        let (view, alerts) = (monitor.view(), monitor.alerts());
        let fires = |severity: Severity| {
            alerts.iter().filter(|alert| alert.phase == AlertPhase::Firing && alert.severity == severity).count()
        };
        let members_up = view.members.iter().filter(|member| member.is_up()).count();
        let (critical, warnings) = (fires(Severity::Critical), fires(Severity::Warning));
        let primary = view.primary().map(|member| member.host.clone());
        let status = match members_up {
            0 => "down",
            _ if members_up < view.members.len() || primary.is_none() || critical > 0 => "degraded",
            _ => "healthy",
        };
        Self { status, members: view.members.len(), members_up, primary, critical, warnings }
    }
}

async fn health(State(monitor): State<Arc<Monitor>>) -> Response {
    let health = Health::of(&monitor);
    let status = if health.members_up == 0 { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::OK };
    (status, Json(health)).into_response()
}

async fn ready(State(monitor): State<Arc<Monitor>>) -> Response {
    let health = Health::of(&monitor);
    let status = if health.primary.is_none() { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::OK };
    (status, Json(health)).into_response()
}

async fn metrics(State(monitor): State<Arc<Monitor>>) -> Response {
    ([(header::CONTENT_TYPE, OPEN_METRICS_CONTENT_TYPE)], monitor.view().to_open_metrics()).into_response()
}

/// How the members replicate.
#[derive(Serialize)]
struct ReplicationStatus {
    primary: Option<String>,
    term: Option<f64>,
    members: Vec<ReplicatingMember>,
}

#[derive(Serialize)]
struct ReplicatingMember {
    host: String,
    is_up: bool,
    state: Option<String>,
    /// As the primary tells it.
    lag_seconds: Option<f64>,
    oplog_window_seconds: Option<f64>,
    headroom_seconds: Option<f64>,
}

async fn replication_status(State(monitor): State<Arc<Monitor>>) -> Json<ReplicationStatus> {
    let view = monitor.view();
    let told = |name: &str, host: &str| view.members.iter().find_map(|teller| teller.number(name, &[host]));
    let member = |member: &MemberView| ReplicatingMember {
        host: member.host.clone(),
        is_up: member.is_up(),
        state: member.state().map(str::to_owned),
        lag_seconds: told("mongodb_replica_lag_seconds", &member.host),
        oplog_window_seconds: member.number("mongodb_oplog_window_seconds", &[]),
        headroom_seconds: told("mongodb_replication_headroom_seconds", &member.host),
    };
    let terms = view.members.iter().filter_map(|member| member.number("mongodb_replica_term", &[]));
    Json(ReplicationStatus {
        primary: view.primary().map(|member| member.host.clone()),
        term: terms.reduce(f64::max),
        members: view.members.iter().map(member).collect(),
    })
}

/// A part of the page. It loads nothing from elsewhere, and the browser is told so.
fn page(kind: &'static str, text: &'static str) -> Response {
    let headers = [
        (header::CONTENT_TYPE, kind),
        (header::CACHE_CONTROL, "no-cache"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (
            header::CONTENT_SECURITY_POLICY,
            "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; frame-ancestors 'self'",
        ),
    ];
    (headers, text).into_response()
}

/// The parts of the page.
const PAGE: &[(&str, &str, &str)] = &[
    ("/dashboard", "text/html; charset=utf-8", include_str!("dashboard/dashboard.html")),
    ("/dashboard/dashboard.css", "text/css; charset=utf-8", include_str!("dashboard/dashboard.css")),
    ("/dashboard/dashboard.js", SCRIPT, include_str!("dashboard/dashboard.js")),
    ("/dashboard/charts.js", SCRIPT, include_str!("dashboard/charts.js")),
    ("/dashboard/drawing.js", SCRIPT, include_str!("dashboard/drawing.js")),
    ("/dashboard/elements.js", SCRIPT, include_str!("dashboard/elements.js")),
    ("/dashboard/format.js", SCRIPT, include_str!("dashboard/format.js")),
    ("/dashboard/readings.js", SCRIPT, include_str!("dashboard/readings.js")),
    ("/dashboard/sections.js", SCRIPT, include_str!("dashboard/sections.js")),
];
const SCRIPT: &str = "text/javascript; charset=utf-8";

#[derive(Deserialize)]
struct Range {
    #[serde(default)]
    range: Option<String>,
}

#[derive(Serialize)]
struct Dashboard {
    health: Health,
    range_seconds: u64,
    /// How often members are sampled.
    interval_seconds: f64,
    alerts: Vec<Alert>,
    events: Vec<FailoverEvent>,
    view: View,
    /// By host.
    over_range: BTreeMap<String, Vec<Series>>,
    charts: Vec<Chart>,
}

#[derive(Serialize)]
struct Series {
    name: &'static str,
    kind: Kind,
    labels: BTreeMap<&'static str, String>,
    #[serde(flatten)]
    summary: Summary,
}

async fn dashboard(State(monitor): State<Arc<Monitor>>, Query(Range { range }): Query<Range>) -> Response {
    let range_seconds = match range.as_deref().map(str::parse) {
        None => RANGE_SECONDS,
        Some(Ok(seconds)) if seconds > 0 => seconds,
        Some(_) => return (StatusCode::BAD_REQUEST, "range is a number of seconds, as in ?range=900").into_response(),
    };
    let view = monitor.view();
    let series = |host: &str| {
        let summaries = monitor.summaries(host, Duration::from_secs(range_seconds)).into_iter();
        let series = summaries.map(|(metric, labels, summary)| Series {
            name: metric.name,
            kind: metric.kind,
            labels: metric.labels.iter().copied().zip(labels).collect(),
            summary,
        });
        series.collect()
    };
    let over_range = view.members.iter().map(|member| (member.host.clone(), series(&member.host))).collect();
    let health = Health::of(&monitor);
    let charts = charts(&monitor, Duration::from_secs(range_seconds));
    let (alerts, events) = (monitor.alerts(), monitor.failovers());
    let interval_seconds = monitor.shared().settings.interval.as_secs_f64();
    Json(Dashboard { health, range_seconds, interval_seconds, alerts, events, view, over_range, charts }).into_response()
}

const RANGE_SECONDS: u64 = 900;
