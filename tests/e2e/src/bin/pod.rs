//! What stands in for a pod: `pod serve NAME tcp:PORT udp:PORT …` answers with its name and whom it saw, `pod ask tcp|udp
//! ADDRESS:PORT` asks once and prints the answer, or how it was turned away.

#![allow(clippy::print_stdout, reason = "its output is its answer")]

use std::io::{Error, ErrorKind, Read, Write};
use std::net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

/// How long a question waits: a dropped packet is told from a refused one by this.
const PATIENCE: Duration = Duration::from_secs(2);

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["serve", name, ports @ ..] if !ports.is_empty() => serve(name, ports),
        ["ask", protocol, address] => ask(protocol, address),
        _ => {
            eprintln!("pod serve NAME tcp:PORT|udp:PORT… | pod ask tcp|udp ADDRESS:PORT");
            ExitCode::from(2)
        }
    }
}

fn serve(name: &str, ports: &[&str]) -> ExitCode {
    let mut threads = Vec::new();
    for port in ports {
        let Some((protocol, number)) = port.split_once(':') else { return ExitCode::from(2) };
        let Ok(number) = number.parse::<u16>() else { return ExitCode::from(2) };
        // The unspecified IPv6 address takes IPv4 too.
        let address = SocketAddr::from((Ipv6Addr::UNSPECIFIED, number));
        let name = name.to_owned();
        let started = match protocol {
            "tcp" => TcpListener::bind(address).map(|listener| thread::spawn(move || answer_streams(&name, &listener))),
            _ => UdpSocket::bind(address).map(|socket| thread::spawn(move || answer_datagrams(&name, &socket))),
        };
        match started {
            Ok(thread) => threads.push(thread),
            Err(error) => {
                eprintln!("{port}: {error}");
                return ExitCode::FAILURE;
            }
        }
    }
    println!("{name} serves {}", ports.join(" "));
    for thread in threads {
        let _ = thread.join();
    }
    ExitCode::SUCCESS
}

fn greeting(name: &str, client: SocketAddr) -> String {
    format!("{name} saw {}\n", client.ip().to_canonical())
}

fn answer_streams(name: &str, listener: &TcpListener) {
    for stream in listener.incoming() {
        let Ok(mut stream) = stream else { continue };
        let Ok(client) = stream.peer_addr() else { continue };
        let text = greeting(name, client);
        thread::spawn(move || -> Result<(), Error> {
            stream.set_read_timeout(Some(PATIENCE))?;
            let mut request = Vec::new();
            let mut piece = [0; 1024];
            while !request.ends_with(b"\r\n\r\n") {
                let count = stream.read(&mut piece)?;
                if count == 0 {
                    break;
                }
                request.extend_from_slice(&piece[..count]);
            }
            write!(stream, "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{text}", text.len())
        });
    }
}

fn answer_datagrams(name: &str, socket: &UdpSocket) {
    let mut request = [0; 1500];
    while let Ok((_, client)) = socket.recv_from(&mut request) {
        let _ = socket.send_to(greeting(name, client).as_bytes(), client);
    }
}

fn ask(protocol: &str, address: &str) -> ExitCode {
    let Ok(address) = address.parse::<SocketAddr>() else { return ExitCode::from(2) };
    let answer = if protocol == "tcp" { ask_stream(address) } else { ask_datagram(address) };
    match answer {
        Ok(text) => {
            print!("{text}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            let how = match error.kind() {
                ErrorKind::ConnectionRefused => "refused".to_owned(),
                ErrorKind::TimedOut | ErrorKind::WouldBlock => "silence".to_owned(),
                _ => error.to_string(),
            };
            println!("{how}");
            ExitCode::FAILURE
        }
    }
}

fn ask_stream(address: SocketAddr) -> Result<String, Error> {
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"GET / HTTP/1.1\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text.split_once("\r\n\r\n").map_or(String::new(), |(_, body)| body.to_owned()))
}

fn ask_datagram(address: SocketAddr) -> Result<String, Error> {
    let local: SocketAddr =
        if address.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { (Ipv6Addr::UNSPECIFIED, 0).into() };
    let socket = UdpSocket::bind(local)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.connect(address)?;
    socket.send(b"who")?;
    let mut answer = [0; 1500];
    let count = socket.recv(&mut answer)?;
    Ok(String::from_utf8_lossy(&answer[..count]).into_owned())
}
