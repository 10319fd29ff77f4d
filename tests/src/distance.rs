//! Distance between processes of one machine: connections whose bytes come later, because not every kernel can hold packets
//! back by itself.
//!
//! What comes in at one end goes out at the other after the time of the way, in order. Whoever is asked sees the address
//! from which the way ends, so that askers may be of different networks.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::mpsc;
use tokio::time::Instant;

/// Most bytes that travel as one.
const PIECE: usize = 16 * 1024;
/// Most pieces on the way.
const ON_THE_WAY: usize = 1024;

/// Opens a way to an address, each direction of which takes so long; gives where it begins. It lasts as long as the runtime.
///
/// # Panics
/// When this machine has no free port.
pub async fn way(to: SocketAddr, from: IpAddr, takes: Duration) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let addr = listener.local_addr().expect("its address");
    tokio::spawn(async move {
        while let Ok((near, _)) = listener.accept().await {
            // One that cannot be reached hangs up, as it does on who comes directly.
            let (Ok(far), Ok(())) = (connect(to, from).await, near.set_nodelay(true)) else { continue };
            let ((near_in, near_out), (far_in, far_out)) = (near.into_split(), far.into_split());
            tokio::spawn(carry(near_in, far_out, takes));
            tokio::spawn(carry(far_in, near_out, takes));
        }
    });
    addr
}

async fn connect(to: SocketAddr, from: IpAddr) -> std::io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.bind(SocketAddr::new(from, 0))?;
    let stream = socket.connect(to).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

async fn carry(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, takes: Duration) {
    let (sender, mut arriving) = mpsc::channel::<(Instant, Vec<u8>)>(ON_THE_WAY);
    tokio::spawn(async move {
        while let Some((at, bytes)) = arriving.recv().await {
            tokio::time::sleep_until(at).await;
            if to.write_all(&bytes).await.is_err() {
                return;
            }
        }
    });
    loop {
        let mut bytes = vec![0; PIECE];
        match from.read(&mut bytes).await {
            Ok(0) | Err(_) => return,
            Ok(len) => bytes.truncate(len),
        }
        if sender.send((Instant::now() + takes, bytes)).await.is_err() {
            return;
        }
    }
}
