//! Online requests through the server, compared with the same requests to the provider itself.

use std::process::Command;

use anyhow::Result;
use batchwright_bench::Server;
use bytes::Bytes;
use serde_json::Value;

use crate::{
    CONNECTIONS, Paths, REQUESTS, ROUNDS, median, plugin_folder, raw_client, request_line, say,
    serve,
};

/// Returns the body of a request.
fn body(number: usize) -> Bytes {
    let line: Value = serde_json::from_str(&request_line(number)).unwrap_or_default();
    Bytes::from(line.get("body").unwrap_or(&Value::Null).to_string())
}

/// Measures answers a second and CPU time, with the usage of each request committed.
pub async fn online(paths: &Paths) -> Result<()> {
    let stub = Server::start(Command::new(&paths.stub).arg("--fast"))?;
    let plugins = plugin_folder(paths, &stub.url)?;
    let data = tempfile::tempdir()?;
    let server = Server::start(&mut serve(paths, data.path(), plugins.path(), &[]))?;
    let (mut ratios, mut costs) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        let raw = raw_client(&stub.url, body).await?;
        let cpu = server.cpu_seconds()?;
        let rate = raw_client(&server.url, body).await?;
        let cpu = (server.cpu_seconds()? - cpu) * 1e6 / REQUESTS as f64;
        ratios.push(rate / raw);
        costs.push(cpu);
        say(&format!(
            "online {round}: provider itself {raw:.0}/s, through the server {rate:.0}/s, \
             ratio {:.2}, CPU {cpu:.0} us a request",
            rate / raw
        ));
    }
    say(&format!(
        "online: {:.2} of the provider itself, CPU {:.0} us a request (median of {ROUNDS}, \
         {REQUESTS} requests, {CONNECTIONS} connections)",
        median(ratios),
        median(costs)
    ));
    Ok(())
}
