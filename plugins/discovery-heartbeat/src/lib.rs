//! Tells LMCache's discovery service that this server is alive, as the heartbeat of LMCache's
//! frontend does (`lmcache_frontend/heartbeat.py`): a GET with `api_address`, `version`, `pid` and
//! `other_info`, again and again. Settings have the names that LMCache's own plugin gives them.

use std::time::Duration;

use serde_json::json;
use stockade_plugin::{
    HandlerResult, Plugin, Start, Timer, config::Config, http, info, metrics, timer, warn,
};

/// As `--heartbeat-interval` of LMCache's frontend.
const DEFAULT_INTERVAL: Duration = Duration::from_secs(30);

/// Failures that are logged one by one; after them, one in so many.
const LOGGED_FAILURES: u64 = 10;

struct Heartbeat {
    service: String,
    api_address: String,
    version: String,
    started_ms: i64,
    failures: u64,
}

impl Plugin for Heartbeat {
    fn start(start: &Start) -> HandlerResult<Self> {
        let config = Config::load()?;
        let service: String = config.required("plugin.frontend.heartbeat_url")?;
        let interval = config.seconds("plugin.frontend.heartbeat_interval", 1.0..=86_400.0)?;
        let delay = config.seconds("plugin.frontend.heartbeat_initial_delay", 0.0..=86_400.0)?;
        let api_address = format!("http://{}", authority(&config)?);
        let (delay, interval) = (
            delay.unwrap_or_default(),
            interval.unwrap_or(DEFAULT_INTERVAL),
        );
        timer::every_after("heartbeat", delay, interval)?;
        info!(
            "telling {service} of {api_address} every {} s",
            interval.as_secs_f64()
        );
        Ok(Self {
            service,
            api_address,
            version: start.server.clone(),
            started_ms: stockade_plugin::clock_ms(),
            failures: 0,
        })
    }

    fn timer(&mut self, _: &Timer) -> HandlerResult {
        match self.beat() {
            Ok(()) => {
                metrics::add("heartbeats", 1.0)?;
                if self.failures > 0 {
                    info!(
                        "the discovery service is back after {} failures",
                        self.failures
                    );
                }
                self.failures = 0;
            }
            Err(reason) => {
                metrics::add("heartbeat_failures", 1.0)?;
                self.failures += 1;
                let failures = self.failures;
                if failures <= LOGGED_FAILURES || failures % LOGGED_FAILURES == 0 {
                    warn!("heartbeat failed {failures} times: {reason}");
                }
            }
        }
        Ok(())
    }
}

impl Heartbeat {
    fn beat(&self) -> HandlerResult {
        let other = json!({"startup_time": timestamp(self.started_ms), "nodes_count": 1});
        let query = [
            // A module has no process of its own, and the field wants a number.
            ("pid", "0".to_owned()),
            ("api_address", self.api_address.clone()),
            ("version", self.version.clone()),
            ("other_info", other.to_string()),
        ];
        let query: Vec<String> = query
            .iter()
            .map(|(name, value)| format!("{name}={}", percent_encoded(value)))
            .collect();
        let separator = if self.service.contains('?') { '&' } else { '?' };
        let url = format!("{}{separator}{}", self.service, query.join("&"));
        let response = http::Request::get(url).send()?;
        match response.is_success() {
            true => Ok(()),
            false => Err(format!("the discovery service answered {}", response.status).into()),
        }
    }
}

/// Host and port by which others reach the HTTP API of this server.
fn authority(config: &Config) -> HandlerResult<String> {
    let bound = &config.http_config.http_host;
    let is_everywhere = matches!(&**bound, "" | "0.0.0.0" | "::" | "[::]");
    let host = match config.setting::<String>("plugin.frontend.report_host")? {
        Some(host) => host,
        None => match std::env::var("POD_IP") {
            Ok(address) if !address.is_empty() => address,
            _ if is_everywhere => {
                return Err("which host to report is not known: set plugin.frontend.report_host, or grant and set POD_IP".into());
            }
            _ => bound.clone(),
        },
    };
    let is_bare_v6 = host.contains(':') && !host.starts_with('[');
    let host = if is_bare_v6 {
        format!("[{host}]")
    } else {
        host
    };
    Ok(format!("{host}:{}", config.http_config.http_port))
}

/// Everything but the unreserved characters of RFC 3986 as `%XX`.
fn percent_encoded(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                encoded.push(char::from(byte));
            }
            _ => encoded.push_str(&format!("%{byte:02X}")),
        }
    }
    encoded
}

/// A time as Python's `isoformat` writes it, in UTC.
fn timestamp(epoch_ms: i64) -> String {
    let (days, second) = (
        epoch_ms.div_euclid(86_400_000),
        epoch_ms.div_euclid(1000).rem_euclid(86_400),
    );
    // Days to a date of the Gregorian calendar, by eras of 400 years that begin in March.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 {
        shifted_month + 3
    } else {
        shifted_month - 9
    };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}",
        second / 3600,
        second / 60 % 60,
        second % 60
    )
}

stockade_plugin::export_plugin!(Heartbeat);

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use std::{cell::RefCell, rc::Rc};

    use super::*;
    use stockade_plugin::{Error, ErrorCode, http::Response, testing::Host};

    type Asked = Rc<RefCell<Vec<String>>>;

    /// A service that answers with `statuses`, one after the other; 0 is nobody there.
    fn host(statuses: Vec<u16>) -> (Host, Asked) {
        let asked = Asked::default();
        let (log, mut statuses) = (Rc::clone(&asked), statuses.into_iter());
        let host = Host::new()
            .config(json!({"http_config": {"http_host": "10.1.2.3", "http_port": 8080}}))
            .setting("plugin.frontend.heartbeat_url", "http://d/heartbeat")
            .http(move |request| {
                log.borrow_mut().push(request.url.clone());
                let mut response = Response::default();
                response.status = statuses.next().unwrap_or(200);
                match response.status {
                    0 => Err(Error::new(ErrorCode::Unavailable, "connection refused")),
                    _ => Ok((response, Vec::new())),
                }
            });
        (host, asked)
    }

    #[test]
    fn it_reports_what_lmcache_s_heartbeat_reports() {
        let (host, asked) = host(vec![]);
        let mut plugin = host.start::<Heartbeat>().unwrap();
        plugin.advance(Duration::from_secs(65)).unwrap();
        assert_eq!(asked.borrow().len(), 3);
        let expected = "http://d/heartbeat?pid=0&api_address=http%3A%2F%2F10.1.2.3%3A8080&version=0.1.0&other_info=%7B%22nodes_count%22%3A1%2C%22startup_time%22%3A%222023-11-14T22%3A13%3A20%22%7D";
        assert_eq!(asked.borrow()[0], expected);
        assert_eq!(host.counter("heartbeats"), 3.0);
    }

    #[test]
    fn settings_say_when_and_for_whom() {
        let (host, asked) = host(vec![]);
        let host = host
            .setting("plugin.frontend.heartbeat_url", "http://d/h?zone=1")
            .setting("plugin.frontend.heartbeat_initial_delay", 5)
            .setting("plugin.frontend.heartbeat_interval", 10)
            .setting("plugin.frontend.report_host", "fd00::1");
        let mut plugin = host.start::<Heartbeat>().unwrap();
        plugin.advance(Duration::from_secs(4)).unwrap();
        assert!(asked.borrow().is_empty());
        plugin.advance(Duration::from_secs(11)).unwrap();
        assert_eq!(asked.borrow().len(), 2);
        assert!(asked.borrow()[0].starts_with(
            "http://d/h?zone=1&pid=0&api_address=http%3A%2F%2F%5Bfd00%3A%3A1%5D%3A8080&"
        ));
    }

    #[test]
    fn failures_are_counted_and_it_goes_on() {
        let (host, _) = host(vec![0, 500, 200]);
        let mut plugin = host.start::<Heartbeat>().unwrap();
        plugin.advance(Duration::from_secs(60)).unwrap();
        assert_eq!(
            (
                host.counter("heartbeats"),
                host.counter("heartbeat_failures")
            ),
            (1.0, 2.0)
        );
        let said = host.log_lines();
        assert_eq!(said[1], "heartbeat failed 1 times: connection refused");
        assert_eq!(
            said[2],
            "heartbeat failed 2 times: the discovery service answered 500"
        );
        assert_eq!(said[3], "the discovery service is back after 2 failures");
    }

    #[test]
    fn what_it_cannot_know_it_asks_for() {
        let host = Host::new();
        let error = host.start::<Heartbeat>().err().unwrap().to_string();
        assert!(error.contains("plugin.frontend.heartbeat_url"), "{error}");
        let host = host.setting("plugin.frontend.heartbeat_url", "http://d/");
        let error = host.start::<Heartbeat>().err().unwrap().to_string();
        assert!(error.contains("report_host"), "{error}");
    }

    #[test]
    fn dates_are_those_of_the_calendar() {
        assert_eq!(timestamp(0), "1970-01-01T00:00:00");
        assert_eq!(timestamp(951_782_400_000), "2000-02-29T00:00:00");
        assert_eq!(timestamp(1_709_251_199_999), "2024-02-29T23:59:59");
        assert_eq!(timestamp(-1000), "1969-12-31T23:59:59");
    }
}
