//! An HTTP interface that a host mounts into its own server.

use axum::{
    Json, Router,
    extract::{DefaultBodyLimit, Query, State},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::{get, put},
};
use serde::{Deserialize, Serialize};

use crate::{ConnectionStatus, LoggedRequest, ProxyHandle, Rules, RulesStatus, Statistics};

/// Routes for [axum](https://docs.rs/axum) that show what a proxy does, and change it:
///
/// | route | what | status |
/// |---|---|---|
/// | `GET /health` | whether it takes new work, for a balancer | 200; 503 while it drains |
/// | `GET /api/statistics` | what has happened since it was there: [`Statistics`] | 200 |
/// | `GET /api/connections` | the connections that there are: [`ConnectionStatus`] | 200 |
/// | `GET /api/requests` | the requests that were logged last: [`LoggedRequest`] | 200 |
/// | `GET /api/rules` | the rules in force and what they have seen: [`RulesStatus`] | 200 |
/// | `PUT /api/rules` | puts the rules of the body in force, as [`Rules::from_json`] reads them; with `?dry_run=true` only checks them | 200; 400 with what is wrong, and nothing is changed |
/// | `PUT /api/drain` | lets nothing new begin: [`ProxyHandle::drain`] | 200 |
///
/// Whoever can reach them learns who is connected and can take every rule away: mount them where only those come who may, behind what asks who they are
/// if browsers come there, too. What changes something is a `PUT`, so that no mere link or form of another site does.
///
/// ```no_run
/// # async fn f(proxy: mongo_proxy::Proxy) -> Result<(), Box<dyn std::error::Error>> {
/// let app = axum::Router::new().nest("/proxy", mongo_proxy::router(proxy.handle()));
/// let listener = tokio::net::TcpListener::bind("127.0.0.1:9217").await?;
/// axum::serve(listener, app).await?;
/// # Ok(()) }
/// ```
pub fn router(proxy: ProxyHandle) -> Router {
    Router::new()
        .route("/health", get(health))
        .route("/api/statistics", get(statistics))
        .route("/api/connections", get(connections))
        .route("/api/requests", get(requests))
        .route("/api/rules", get(rules).put(set_rules))
        .route("/api/drain", put(drain))
        .layer(DefaultBodyLimit::max(LONGEST_RULES))
        .with_state(proxy)
}

#[derive(Serialize)]
struct Health {
    status: &'static str,
    connections: usize,
}

async fn health(State(proxy): State<ProxyHandle>) -> Response {
    let statistics = proxy.statistics();
    let (status, code) = match statistics.is_draining {
        true => ("draining", StatusCode::SERVICE_UNAVAILABLE),
        false => ("serving", StatusCode::OK),
    };
    (code, Json(Health { status, connections: statistics.connections })).into_response()
}

async fn statistics(State(proxy): State<ProxyHandle>) -> Json<Statistics> {
    Json(proxy.statistics())
}

async fn connections(State(proxy): State<ProxyHandle>) -> Json<Vec<ConnectionStatus>> {
    Json(proxy.connections())
}

async fn requests(State(proxy): State<ProxyHandle>) -> Json<Vec<LoggedRequest>> {
    Json(proxy.requests())
}

async fn rules(State(proxy): State<ProxyHandle>) -> Json<RulesStatus> {
    Json(proxy.rules())
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Trying {
    #[serde(default)]
    dry_run: bool,
}

/// What has become of rules that were sent.
#[derive(Serialize)]
struct Taken {
    /// The version that is in force.
    version: u64,
    /// Whether they were only checked.
    dry_run: bool,
}

#[derive(Serialize)]
struct Wrong {
    error: String,
}

async fn set_rules(State(proxy): State<ProxyHandle>, Query(Trying { dry_run }): Query<Trying>, text: String) -> Response {
    let taken = Rules::from_json(&text).and_then(|rules| match dry_run {
        true => Ok(proxy.rules().version),
        false => proxy.set_rules(&rules),
    });
    match taken {
        Ok(version) => Json(Taken { version, dry_run }).into_response(),
        Err(error) => (StatusCode::BAD_REQUEST, Json(Wrong { error: error.report() })).into_response(),
    }
}

async fn drain(State(proxy): State<ProxyHandle>) -> Response {
    proxy.drain();
    Json(proxy.statistics()).into_response()
}

const LONGEST_RULES: usize = 1 << 20;
