//! A name server on loopback that knows TXT records only: enough to keep lists of nodes.

use std::collections::BTreeMap;
use std::net::{SocketAddr, UdpSocket};
use std::sync::{Arc, Mutex};

/// Texts by the name that has them, in lower case.
type Zone = Arc<Mutex<BTreeMap<String, Vec<String>>>>;

/// Greatest question that is read, in bytes.
const MAX_QUESTION: usize = 512;
/// Greatest part of a text, in bytes.
const MAX_STRING: usize = 255;
/// Type of the records.
const TXT: [u8; 2] = [0, 16];

/// The server; it answers until its process ends.
#[derive(Debug)]
pub struct NameServer {
    /// Where it is asked.
    pub address: SocketAddr,
    zone: Zone,
}

impl NameServer {
    /// Starts it, without any record.
    ///
    /// # Panics
    /// When no port is free.
    #[must_use]
    pub fn start() -> Self {
        let socket = UdpSocket::bind("127.0.0.1:0").expect("a free port");
        let address = socket.local_addr().expect("it has an address");
        let zone = Zone::default();
        let known = Arc::clone(&zone);
        std::thread::spawn(move || {
            let mut question = [0; MAX_QUESTION];
            while let Ok((len, from)) = socket.recv_from(&mut question) {
                if let Some(answer) = answer(&question[..len], &known) {
                    // Whoever asked may have gone.
                    let _ = socket.send_to(&answer, from);
                }
            }
        });
        Self { address, zone }
    }

    /// Gives the list `/dnsaddr/HOST` these addresses, instead of those that it had.
    ///
    /// # Panics
    /// When the server has panicked.
    pub fn list<S: AsRef<str>>(&self, host: &str, addresses: impl IntoIterator<Item = S>) {
        let texts = addresses.into_iter().map(|addr| format!("dnsaddr={}", addr.as_ref())).collect();
        self.zone.lock().expect("the server runs").insert(format!("_dnsaddr.{host}"), texts);
    }
}

/// The answer to a question for one name; `None` if it is none.
fn answer(question: &[u8], zone: &Zone) -> Option<Vec<u8>> {
    let (mut at, mut name) = (12, Vec::new());
    loop {
        let len = usize::from(*question.get(at)?);
        at += 1;
        if len == 0 {
            break;
        }
        name.push(String::from_utf8_lossy(question.get(at..at + len)?).to_lowercase());
        at += len;
    }
    let asked = question.get(12..at + 4)?;
    let is_text = question.get(at..at + 2)? == TXT;
    let zone = zone.lock().ok()?;
    let texts = zone.get(&name.join("."));
    let code = if texts.is_some() { 0 } else { 3 };
    let texts = texts.filter(|_| is_text).map(Vec::as_slice).unwrap_or_default();
    let mut out = question.get(..2)?.to_vec();
    out.extend([0x81, 0x80 | code, 0, 1, 0, texts.len() as u8, 0, 0, 0, 0]);
    out.extend(asked);
    for text in texts {
        let parts = text.as_bytes().chunks(MAX_STRING);
        let data: Vec<u8> = parts.flat_map(|part| [&[part.len() as u8], part].concat()).collect();
        // The name of the question, class IN, a life of one second.
        out.extend([0xC0, 12, TXT[0], TXT[1], 0, 1, 0, 0, 0, 1]);
        out.extend((data.len() as u16).to_be_bytes());
        out.extend(data);
    }
    Some(out)
}
