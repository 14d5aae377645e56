//! Whose socket is at the other end of a TCP connection that never leaves this machine.
//!
//! The kernel lists both ends of such a connection (`/proc/net/tcp`, proc_net_tcp.txt of its
//! documentation), each with the user that made the socket. A peer on another machine has no
//! entry here, whatever it sends.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// A listing read in pieces can miss an entry while others come and go.
const ATTEMPTS: usize = 3;

/// `TCP_ESTABLISHED`. In later states a socket may have no owner, and is then shown as root's.
const ESTABLISHED: &str = "01";

/// The user whose socket at `peer` is connected to `own`; `None` if the kernel knows of none.
///
/// Reads files that grow with the machine's sockets: not for async threads.
pub(super) fn user_of(peer: SocketAddr, own: SocketAddr) -> Option<u32> {
    let wanted = (canonical(peer), canonical(own));
    let listed = |path| {
        let lines = BufReader::new(File::open(path).ok()?).lines();
        lines
            .map_while(Result::ok)
            .find_map(|line| entry(&line).filter(|(ends, _)| *ends == wanted))
    };
    (0..ATTEMPTS)
        .find_map(|_| listed("/proc/net/tcp").or_else(|| listed("/proc/net/tcp6")))
        .map(|(_, user)| user)
}

/// An IPv4 socket talks to an IPv6 one by addresses that only look different.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// Local and remote end of an established connection, and its user.
fn entry(line: &str) -> Option<((SocketAddr, SocketAddr), u32)> {
    let mut fields = line.split_ascii_whitespace();
    let own = address(fields.nth(1)?)?;
    let remote = address(fields.next()?)?;
    if fields.next()? != ESTABLISHED {
        return None;
    }
    let user = fields.nth(3)?.parse().ok()?;
    let inode = fields.nth(1)?;
    // A socket that no process holds any more.
    (inode != "0").then_some(((own, remote), user))
}

/// `HEX:PORT`; the address is printed in words of the machine's byte order.
fn address(text: &str) -> Option<SocketAddr> {
    let (ip, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let word = |at: usize| {
        let word = u32::from_str_radix(ip.get(at..at + 8)?, 16).ok()?;
        Some(word.to_ne_bytes())
    };
    let ip = match ip.len() {
        8 => IpAddr::V4(Ipv4Addr::from(word(0)?)),
        32 => {
            let words = [word(0)?, word(8)?, word(16)?, word(24)?];
            let mut bytes = [0; 16];
            bytes.copy_from_slice(words.as_flattened());
            IpAddr::V6(Ipv6Addr::from(bytes))
        }
        _ => return None,
    };
    Some(canonical(SocketAddr::new(ip, port)))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
    use std::net::{TcpListener, TcpStream};

    use super::*;

    fn me() -> u32 {
        rustix::process::getuid().as_raw()
    }

    #[test]
    fn both_ends_of_a_connection_of_this_machine_are_known() {
        for host in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = TcpListener::bind(host) else {
                continue; // A machine without IPv6.
            };
            let own = listener.local_addr().unwrap();
            let client = TcpStream::connect(own).unwrap();
            let peer = client.local_addr().unwrap();
            assert_eq!(user_of(peer, own), Some(me()), "{host}");
            // The same port to another one is another connection.
            let other = SocketAddr::new(own.ip(), own.port().wrapping_add(1));
            assert_eq!(user_of(peer, other), None);
            drop((listener, client));
            // What is left of it (TIME_WAIT) has no owner, and must not be taken for root's.
            assert_eq!(user_of(peer, own), None);
        }
    }

    #[test]
    fn a_client_that_came_by_ipv4_to_an_ipv6_listener_is_known() {
        let Ok(listener) = TcpListener::bind("[::]:0") else {
            return; // A machine without IPv6.
        };
        let port = listener.local_addr().unwrap().port();
        let client = TcpStream::connect(("127.0.0.1", port)).unwrap();
        let (accepted, peer) = listener.accept().unwrap();
        assert!(matches!(peer.ip(), IpAddr::V6(_)));
        let own = accepted.local_addr().unwrap();
        assert_eq!(user_of(peer, own), Some(me()));
        drop(client);
    }

    #[test]
    fn lines_are_read_as_the_kernel_writes_them() {
        let line = |state: &str, inode: &str| {
            format!(
                "  12: 0100007F:9C40 0100007F:15B3 {state} 00000000:00000000 00:00000000 00000000  1000        0 {inode} 1 0000000000000000 20 4 30 10 -1"
            )
        };
        let ends = (
            "127.0.0.1:40000".parse().unwrap(),
            "127.0.0.1:5555".parse().unwrap(),
        );
        let (little, user) = (entry(&line("01", "77108")), 1000);
        if cfg!(target_endian = "little") {
            assert_eq!(little, Some((ends, user)));
        }
        assert_eq!(entry(&line("06", "0")), None);
        assert_eq!(entry(&line("01", "0")), None);
        for broken in [
            "",
            "0:",
            "  sl  local_address rem_address   st",
            "0: x:1 y:2 01",
        ] {
            assert_eq!(entry(broken), None);
        }
        assert_eq!(address("0100007F"), None);
        assert_eq!(address("é00007F:15B3"), None);
    }
}
