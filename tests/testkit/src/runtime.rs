//! The runtime of what must not end with the runtime of the test that began it.

use std::{io, sync::OnceLock};

use tokio::runtime::{Builder, Runtime};

use crate::{Error, Result};

/// One thread for all fault proxies of this process, and for the connection to Docker.
pub(crate) fn background() -> Result<&'static Runtime> {
    static RUNTIME: OnceLock<io::Result<Runtime>> = OnceLock::new();
    let runtime =
        RUNTIME.get_or_init(|| Builder::new_multi_thread().worker_threads(1).thread_name("mongo-testkit").enable_all().build());
    match runtime {
        Ok(runtime) => Ok(runtime),
        Err(error) => Err(Error::io("start a thread")(io::Error::new(error.kind(), error.to_string()))),
    }
}
