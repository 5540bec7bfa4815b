//! TCP proxy that makes a loopback connection behave like a network: a fixed delay each way and a line of
//! limited rate, shared by all connections and both directions.
//!
//! Threads and blocking sockets, not tasks: a thread's sleep is exact to a tenth of a millisecond, where a
//! runtime's timer rounds to whole ones, and a sleeping thread costs nothing. Each direction has a reader, which
//! stamps what it reads with the time it is due, and a writer, which waits for that time. Only data is delayed:
//! the TCP handshake is not.
//!
//! What passes is counted: S3 requests by kind, and bytes each way. With `--control` the counts can be asked for.

#![deny(unsafe_code)]

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bytes::{Bytes, BytesMut};
use clap::Parser;
use hypernbd_bench_tools::http::{Kind, Requests};
use hypernbd_bench_tools::line::Line;
use parking_lot::{Mutex, MutexGuard};
use serde_json::json;

/// Largest piece read at once: the share of the line one connection gets before the next has its turn.
const PIECE_BYTES: usize = 64 * 1024;
/// Pieces under way in one direction of one connection. Bounds memory when a receiver stops reading, and is far
/// above what a line of 1 GB/s holds in 100 ms.
const PIECES_UNDER_WAY: usize = 4096;
/// How far the line may be booked ahead. Short, so that a small request does not wait behind other connections'
/// bulk; long enough that a late wake-up does not leave the line idle.
const BOOKED_AHEAD_MAX: Duration = Duration::from_millis(2);
/// Where booking goes on after a wait. Well below the limit, so that a full line is not one wait a piece.
const BOOKED_AHEAD_MIN: Duration = Duration::from_micros(500);
const STACK_BYTES: usize = 128 * 1024;

/// Adds a fixed delay each way to TCP connections and caps the line.
#[derive(Parser)]
struct Args {
    /// Address to listen on; port 0 takes a free one. The address is printed.
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// Where connections go.
    #[arg(long, value_name = "HOST:PORT")]
    to: String,
    /// Delay each way, in milliseconds.
    #[arg(long, default_value_t = 10.0)]
    delay_ms: f64,
    /// Rate of the line in all, in 1,000,000 bytes per second; 0 leaves it open.
    #[arg(long, default_value_t = 250)]
    line_mb_per_s: u64,
    /// Address that answers each connection with the counts so far, as one JSON object; port 0 takes a free one. It is
    /// printed on the second line.
    #[arg(long)]
    control: Option<SocketAddr>,
}

/// What has passed since the start, all connections together.
#[derive(Default)]
struct Counts {
    requests: [AtomicU64; Kind::ALL.len()],
    /// Bytes from clients to the store, heads included.
    sent_bytes: AtomicU64,
    /// Bytes from the store to clients, heads included.
    received_bytes: AtomicU64,
}

impl Counts {
    fn as_json(&self) -> serde_json::Value {
        let requests: serde_json::Map<_, _> = Kind::ALL
            .into_iter()
            .map(|kind| {
                (
                    kind.name().to_owned(),
                    self.requests[kind as usize].load(Relaxed).into(),
                )
            })
            .collect();
        json!({
            "requests": requests,
            "sent_bytes": self.sent_bytes.load(Relaxed),
            "received_bytes": self.received_bytes.load(Relaxed),
        })
    }
}

/// What all connections share.
struct Proxy {
    to: String,
    line: Mutex<Line>,
    counts: Counts,
}

/// A piece of the stream, or its end (`None`), and when it arrives.
type Piece = (Instant, Option<Bytes>);

fn main() -> Result<()> {
    let args = Args::parse();
    let delay = Duration::try_from_secs_f64(args.delay_ms / 1e3).context("--delay-ms: not a delay")?;
    let rate = (args.line_mb_per_s > 0).then_some(args.line_mb_per_s * 1_000_000);
    let proxy = Arc::new(Proxy {
        to: args.to,
        line: Mutex::new(Line::new(Instant::now(), delay, rate)),
        counts: Counts::default(),
    });
    let listener = TcpListener::bind(args.listen).with_context(|| format!("--listen {}", args.listen))?;
    println!("{}", listener.local_addr()?);
    if let Some(address) = args.control {
        let control = TcpListener::bind(address).with_context(|| format!("--control {address}"))?;
        println!("{}", control.local_addr()?);
        let proxy = proxy.clone();
        thread::spawn(move || answer_counts(&control, &proxy.counts));
    }
    loop {
        match listener.accept() {
            Ok((client, peer)) => {
                if let Err(error) = connect(client, &proxy) {
                    eprintln!("delay-proxy: connection from {peer}: {error:#}");
                }
            }
            Err(error) => {
                eprintln!("delay-proxy: accept: {error}");
                thread::sleep(Duration::from_millis(10));
            }
        }
    }
}

/// Answers each connection with the counts so far.
fn answer_counts(control: &TcpListener, counts: &Counts) {
    for stream in control.incoming() {
        let answered =
            stream.and_then(|mut stream| stream.write_all(counts.as_json().to_string().as_bytes()));
        if let Err(error) = answered {
            eprintln!("delay-proxy: control: {error}");
        }
    }
}

/// Connects `client` to the store and starts the four threads that carry the bytes.
fn connect(client: TcpStream, proxy: &Arc<Proxy>) -> Result<()> {
    let server = TcpStream::connect(&proxy.to).with_context(|| format!("--to {}", proxy.to))?;
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    let mut requests = Requests::default();
    carry(
        client.try_clone()?,
        server.try_clone()?,
        proxy,
        move |counts, bytes| {
            counts.sent_bytes.fetch_add(bytes.len() as u64, Relaxed);
            requests.feed(bytes, |kind| {
                counts.requests[kind as usize].fetch_add(1, Relaxed);
            });
        },
    )?;
    carry(server, client, proxy, |counts, bytes| {
        counts.received_bytes.fetch_add(bytes.len() as u64, Relaxed);
    })
}

/// Starts the two threads that carry one direction; `count` sees everything that passes.
fn carry(
    from: TcpStream,
    to: TcpStream,
    proxy: &Arc<Proxy>,
    count: impl FnMut(&Counts, &[u8]) + Send + 'static,
) -> Result<()> {
    let proxy = proxy.clone();
    let (sender, receiver) = sync_channel(PIECES_UNDER_WAY);
    let thread = || thread::Builder::new().stack_size(STACK_BYTES);
    thread().spawn(move || read_pieces(from, &sender, &proxy, count))?;
    thread().spawn(move || write_pieces(&receiver, to))?;
    Ok(())
}

/// Reads until the stream ends or breaks, or until the writer has gone.
fn read_pieces(
    mut from: TcpStream,
    sender: &SyncSender<Piece>,
    proxy: &Proxy,
    mut count: impl FnMut(&Counts, &[u8]),
) {
    let mut buffer = BytesMut::new();
    loop {
        buffer.resize(PIECE_BYTES, 0);
        let len = match from.read(&mut buffer) {
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Ok(len) => len,
            Err(_) => 0,
        };
        count(&proxy.counts, &buffer[..len]);
        let due_at = book(&proxy.line, len);
        let piece = (len > 0).then(|| buffer.split_to(len).freeze());
        if sender.send((due_at, piece)).is_err() || len == 0 {
            return;
        }
    }
}

/// Books the line for `len` bytes and waits where it is booked too far ahead, first come first served. Returns
/// when the bytes arrive.
fn book(line: &Mutex<Line>, len: usize) -> Instant {
    let mut line = line.lock();
    let now = Instant::now();
    let passage = line.send(now, len);
    let booked_ahead = passage.sent_at.saturating_duration_since(now);
    if booked_ahead > BOOKED_AHEAD_MAX {
        thread::sleep(booked_ahead - BOOKED_AHEAD_MIN);
    }
    MutexGuard::unlock_fair(line);
    passage.due_at
}

/// Writes each piece when it is due; ends the stream where the reader saw its end.
fn write_pieces(receiver: &Receiver<Piece>, mut to: TcpStream) {
    for (due_at, piece) in receiver {
        sleep_until(due_at);
        match piece {
            Some(piece) => {
                if to.write_all(&piece).is_err() {
                    // Nobody takes the bytes any more: wake the reader of the other direction too.
                    let _ = to.shutdown(Shutdown::Both);
                    return;
                }
            }
            None => {
                let _ = to.shutdown(Shutdown::Write);
            }
        }
    }
}

fn sleep_until(time: Instant) {
    let wait = time.saturating_duration_since(Instant::now());
    if !wait.is_zero() {
        thread::sleep(wait);
    }
}
