//! Adapter that probes its WASI sandbox: files, environment, sockets, clocks, standard output.
//!
//! The standard library of Rust probes WASI 0.2; with the feature `p3`, the guest also calls WASI
//! 0.3 directly. The `custom_id` of a request names the probe and its argument.

#![expect(
    clippy::print_stdout,
    clippy::panic,
    reason = "tests check how the host handles output and traps"
)]

mod bindings;

use std::net::{TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use bindings::exports::batchwright::plugin::{
    inference::{self, Answer, Outcome, Response, Step},
    plugin,
};

struct Component;

impl plugin::Guest for Component {
    fn describe() -> plugin::Description {
        plugin::Description {
            name: "curious".into(),
            version: "0.0.1".into(),
            summary: "Probes its sandbox".into(),
            endpoints: Vec::new(),
            credentials: Vec::new(),
            settings_schema: "{}".into(),
        }
    }

    fn configure(settings: String) -> Result<(), String> {
        assert!(!settings.contains("panic"), "the guest's own words");
        Ok(())
    }
}

impl inference::Guest for Component {
    fn begin(request: inference::Request) -> Step {
        let (probe, argument) =
            request.custom_id.split_once(' ').unwrap_or((&request.custom_id, ""));
        let found = match probe {
            "look" => look(),
            "read" => format!("{:?}", std::fs::read(argument).map_err(|error| error.kind())),
            "write" => format!("{:?}", std::fs::write(argument, "x").map_err(|error| error.kind())),
            "connect" => format!(
                "{:?}",
                TcpStream::connect(argument).map(drop).map_err(|error| error.kind())
            ),
            "resolve" => {
                format!(
                    "{:?}",
                    (argument, 80)
                        .to_socket_addrs()
                        .map(Iterator::count)
                        .map_err(|error| error.kind())
                )
            }
            "sleep" => {
                std::thread::sleep(Duration::from_secs(3600));
                "awake".into()
            }
            #[cfg(feature = "p3")]
            "sleep-p3" => {
                bindings::wasi::clocks::monotonic_clock::wait_for(3_600_000_000_000);
                "awake".into()
            }
            #[cfg(feature = "p3")]
            "resolve-p3" => format!(
                "{:?}",
                bindings::wasi::sockets::ip_name_lookup::resolve_addresses(argument)
            ),
            "print" => {
                println!("said aloud\u{1b}[31m");
                eprintln!("and aside");
                "said".into()
            }
            "flood" => {
                (0..20_000).for_each(|line| println!("{line} {}", "x".repeat(100)));
                "said".into()
            }
            "exit" => std::process::exit(0),
            "panic" => panic!("the guest's own words"),
            _ => "?".into(),
        };
        Step::Done(Answer::Response(Response {
            status: 200,
            request_id: None,
            body: format!("{{\"found\":\"{}\"}}", found.replace(['"', '\\'], "'")),
            usage: None,
        }))
    }

    fn resume(_: Vec<u8>, _: Outcome) -> Step {
        Self::begin(inference::Request {
            id: String::new(),
            custom_id: String::new(),
            endpoint: String::new(),
            model: String::new(),
            body: String::new(),
            created_at: 0,
            attempt: 1,
        })
    }
}

/// Returns environment, arguments and clocks; with `p3` also folders and random numbers.
fn look() -> String {
    let before = Instant::now();
    let environment: Vec<_> = std::env::vars().collect();
    let arguments: Vec<_> = std::env::args().collect();
    #[expect(clippy::disallowed_methods, reason = "the test probes the clock of the sandbox")]
    let clock = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .is_ok_and(|now| now.as_secs() > 1_700_000_000);
    let found = format!(
        "{environment:?} {arguments:?} clock {clock} {}",
        before.elapsed() < Duration::from_secs(60)
    );
    #[cfg(feature = "p3")]
    let found = {
        use bindings::wasi::{cli, clocks, filesystem, random};
        let environment = cli::environment::get_environment();
        let arguments = cli::environment::get_arguments();
        let folders = filesystem::preopens::get_directories().len();
        let random = random::random::get_random_u64() != random::random::get_random_u64();
        let clock = clocks::monotonic_clock::now() > 0;
        format!("{found} p3 {environment:?} {arguments:?} {folders} random {random} clock {clock}")
    };
    found
}
