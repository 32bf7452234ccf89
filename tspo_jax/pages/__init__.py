"""What people look at: report, video page, contact sheet."""
