export const metadata = { title: "useChat behind relay" };

export default function Layout({ children }) {
  return (
    <html lang="en">
      <body style={{ maxWidth: "40rem", margin: "2rem auto", fontFamily: "sans-serif" }}>{children}</body>
    </html>
  );
}
